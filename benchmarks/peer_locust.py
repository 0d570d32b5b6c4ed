"""Load on a service by Locust: clients that ask one request after another, each on a connection of its own.

    peer_locust.py URL PATH BODIES CLIENTS SECONDS RATE

RATE is how many requests a second all clients send together, at moments that do not depend on one another (a Poisson
process, but that a client waits for its answer); 0 is as many as they can.

BODIES is a file with a JSON list of request bodies; each client sends the next one, round and round. A body that holds
the text `UNIQUE` gets a number of its own in its place each time. The first second is left out.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from typing import Any

import gevent
from locust import FastHttpUser, task
from locust.env import Environment

WARM_UP = 1.0


def main(url: str, path: str, bodies_file: str, clients: str, seconds: str, rate: str) -> None:
    """Send, and print one JSON line: requests a second, times in milliseconds, failures."""
    with open(bodies_file) as file:
        bodies = itertools.cycle([json.dumps(body) for body in json.load(file)])
    number = itertools.count()
    start = time.time_ns()

    class Client(FastHttpUser):
        host = url
        network_timeout = 30.0
        connection_timeout = 30.0

        def on_start(self) -> None:
            self.due = time.monotonic()
            gevent.sleep(self.wait_time())

        def wait_time(self) -> float:
            if not float(rate):
                return 0.0
            self.due += random.expovariate(float(rate) / int(clients))
            return max(0.0, self.due - time.monotonic())

        @task
        def ask(self) -> None:
            body = next(bodies)
            while "UNIQUE" in body:
                body = body.replace("UNIQUE", f"{start}-{next(number)}", 1)
            with self.client.post(path, data=body, headers={"Content-Type": "application/json"}, name=path):
                pass

    found: list[tuple[float, float, bool]] = []

    def note(response_time: float, exception: Any, response: Any, **rest: Any) -> None:
        bad = exception is not None or (response is not None and response.status_code != 200)
        found.append((time.perf_counter(), response_time, bad))

    environment = Environment(user_classes=[Client])
    environment.events.request.add_listener(note)
    runner = environment.create_local_runner()
    begin = time.perf_counter()
    runner.start(int(clients), spawn_rate=1_000)
    gevent.sleep(WARM_UP + float(seconds))
    end = time.perf_counter()
    runner.quit()
    kept = sorted(ms for at, ms, bad in found if begin + WARM_UP <= at <= end and not bad)
    failed = sum(bad for at, _, bad in found)
    lasted = end - begin - WARM_UP

    def place(share: float) -> float | None:
        return round(kept[min(len(kept) - 1, int(share * len(kept)))], 2) if kept else None

    result = {"requests_per_second": round(len(kept) / lasted, 1), "failed": failed, "requests": len(kept)}
    print(json.dumps({**result, "p50_ms": place(0.5), "p95_ms": place(0.95), "p99_ms": place(0.99)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
