"""The service under load: requests a second and their times, events a second, memory, beside a plain endpoint.

The load comes from Locust (32 clients, each on a connection of its own) on loopback, from a process of its own on the
same machine, so that it takes its share of the cores. Clients ask without pauses, which shows how much can be answered
(the time of an answer is then 32 over that, whatever the service does), or at random moments at a given rate, which
shows how long an answer takes at that rate. The model is a SASRec of 64 dimensions and 50 positions over a planted
catalogue: items in groups of 500, whose vectors lie around the group's centre in 16 dimensions with some noise in all
64, as trained item tables do; histories mix three groups. It is not trained: what it answers does not matter here, only
what it costs, and the index, which is built for these vectors and measured with its histories.

    python benchmarks/service.py [--seconds 10] [--only recommend,large,events,memory]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

import peers
from peers import run_peer, write_result
from vouch.data import Dataset, Interactions, Vocabulary, split
from vouch.recommenders.runs import begin_run, finish_run
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training.run import FitReport

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work" / "service"
peers.PEERS["locust"] = ("locust==2.43.0",)
CLIENTS, USERS, GROUP, SIZE = 32, 20_000, 500, 64
RATE = 320
WORKERS = 2
TARGETS = {
    "requests_per_second": 300,
    "p99_ms": 60,
    "large_p99_ms": 100,
    "recall": 0.95,
    "events_per_second": 2_000,
    "memory_mb": 300,
}


# What is served -------------------------------------------------------------------------------------------------------


def planted_run(n_items: int) -> Path:
    """A run folder with `n_items` items, made once."""
    path = WORK / f"sasrec-{n_items}"
    if (path / "run.json").exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    random = np.random.default_rng(0)
    torch.manual_seed(0)
    groups = n_items // GROUP
    lengths = random.integers(5, 60, size=USERS)
    user = np.repeat(np.arange(USERS), lengths)
    liked = random.integers(0, groups, size=(USERS, 3))[user, random.integers(0, 3, size=len(user))]
    item = liked * GROUP + (GROUP * random.random(len(user)) ** 2).astype(np.int64)
    vocabularies = Vocabulary.of_numbers(np.arange(USERS)), Vocabulary.of_numbers(np.arange(n_items))
    log = Interactions.from_codes(*vocabularies, user, item, columns={"time": np.arange(len(user))})
    data = Dataset.of(log, name=f"planted, {n_items:,} items")
    made = split(data)
    model = SASRec(hidden_size=SIZE)
    model.prepare(made.train)
    model.known, model.network = {}, model.encoder(n_items, {})
    basis = torch.randn(16, SIZE) / 4
    centres = torch.randn(groups, 16)[torch.arange(n_items) // GROUP]
    with torch.no_grad():
        around = centres + 0.6 * torch.randn(n_items, 16)
        model.network.item.weight[1:] = 0.2 * (around @ basis + 0.1 * torch.randn(n_items, SIZE))
    begin_run(path, data, "planted", keep_data=True)
    finish_run(path, model, made, FitReport(seconds=0.0), source="planted", seed=0, metrics={})
    return path


def questions(run: Path) -> list[dict[str, Any]]:
    """Request bodies: histories of users, 10 items wanted."""
    log = Interactions.open(run / "data" / "log")
    random = np.random.default_rng(1)
    chosen = random.choice(log.n_users, 2_000, replace=False)
    return [{"history": [str(item) for item in log.history(user)], "k": 10} for user in chosen]


# Servers and load -----------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(words: list[str], port: int, ready: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server process, once it is ready; stopped in the end."""
    log = (WORK / "server.log").open("wb")
    process = subprocess.Popen(
        words, stdout=log, stderr=log, env={**os.environ, **environment}, cwd=HERE, start_new_session=True
    )
    try:
        until = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {(WORK / 'server.log').read_text()[-2_000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                break
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()


@contextlib.contextmanager
def service(run: Path, *, workers: int = 1, **settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`vouch serve` with a database of its own."""
    port = free_port()
    database = WORK / f"service-{port}.db"
    words = [sys.executable, "-m", "vouch.cli", "serve", str(run), "--port", str(port), "--workers", str(workers)]
    words += ["--database", f"sqlite:///{database}"]
    limits = {"VOUCH_SERVICE_REQUESTS_PER_SECOND": "0", **settings}
    try:
        with server(words, port, "/readyz", **limits) as process:
            yield f"http://127.0.0.1:{port}", process
    finally:
        for file in WORK.glob(f"{database.name}*"):
            file.unlink()


@contextlib.contextmanager
def plain(run: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The endpoint without batching, with as many processes; one thread each, which suits it best."""
    port = free_port()
    words = [sys.executable, "-m", "uvicorn", "peer_fastapi:app", "--port", str(port), "--log-level", "warning"]
    words += ["--workers", str(WORKERS), "--no-access-log"]
    with server(words, port, "/healthz", RUN=str(run), OMP_NUM_THREADS="1") as process:
        yield f"http://127.0.0.1:{port}", process


def load(url: str, path: str, bodies: list[dict[str, Any]], seconds: float, rate: float = 0) -> dict[str, Any]:
    """What Locust measured."""
    file = WORK / "bodies.json"
    file.write_text(json.dumps(bodies))
    return run_peer("locust", "peer_locust.py", url, path, file, CLIENTS, seconds, rate)


def under_load(url: str, bodies: list[dict[str, Any]], seconds: float, process: Any) -> dict[str, Any]:
    """As many requests as it answers, what each costs the processor, and the times at the rate that is wanted."""
    before = processor_seconds(process)
    found = load(url, "/v1/recommend", bodies, seconds)
    spent = processor_seconds(process) - before
    sent = found["requests"] * (1 + 1 / seconds)  # the first second is not counted
    return {
        "without_pauses": found,
        "processor_ms_a_request": round(1_000 * spent / max(sent, 1), 2),
        f"at_{RATE}_a_second": load(url, "/v1/recommend", bodies, seconds, RATE),
    }


def processor_seconds(process: Any) -> float:
    """Of a process and those it started."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return sum(each.cpu_times().user + each.cpu_times().system for each in family)


# What is measured -----------------------------------------------------------------------------------------------------


def ceiling(n_items: int, batch: int = CLIENTS) -> dict[str, Any]:
    """Queries a second if there were nothing but the product of their vectors with all items."""
    queries, items = torch.randn(batch, SIZE), torch.randn(n_items, SIZE)
    out = torch.empty(batch, n_items)
    times = []
    for _ in range(12 if n_items <= 200_000 else 5):
        begin = time.perf_counter()
        torch.mm(queries, items.T, out=out)
        times.append(time.perf_counter() - begin)
    best = min(times[1:])
    return {
        "queries_per_second": round(batch / best),
        "batch": batch,
        "gflops": round(2 * batch * SIZE * n_items / best / 1e9, 1),
        "threads": torch.get_num_threads(),
    }


def recommend(seconds: float) -> dict[str, Any]:
    """100,000 items, exactly: the service, the plain endpoint, and the ceiling, in turn."""
    run = planted_run(100_000)
    bodies = questions(run)
    with service(run, workers=WORKERS) as (url, process):
        ours = under_load(url, bodies, seconds, process)
    with plain(run) as (url, process):
        theirs = under_load(url, bodies, seconds, process)
    top = ceiling(100_000)
    rates = [each["without_pauses"]["requests_per_second"] for each in (ours, theirs)]
    return {
        "service": ours,
        "plain": theirs,
        "ceiling": top,
        "times_the_plain": round(rates[0] / max(rates[1], 1e-9), 2),
        "share_of_the_ceiling": round(rates[0] / top["queries_per_second"], 3),
    }


def large(seconds: float) -> dict[str, Any]:
    """1,000,000 items through the index, with its recall; and the ceiling of comparing with all."""
    run = planted_run(1_000_000)
    with service(run, workers=WORKERS) as (url, process):
        ours = under_load(url, questions(run), seconds, process)
        with urllib.request.urlopen(f"{url}/v1/card") as answer:
            index = json.load(answer)["card"]["index"]
    top = ceiling(1_000_000)
    rate = ours["without_pauses"]["requests_per_second"]
    return {
        "service": ours,
        "index": index,
        "ceiling_of_comparing_with_all": top,
        "times_that_ceiling": round(rate / top["queries_per_second"], 2),
    }


def events(seconds: float) -> dict[str, Any]:
    """Events a second that are stored durably on SQLite before they are acknowledged, one and twenty a request."""
    run = planted_run(100_000)
    found = {}
    for many in (1, 20):
        body = {
            "events": [{"id": f"UNIQUE-{at}", "user": f"{at}", "item": f"{at}", "kind": "view"} for at in range(many)]
        }
        with service(run) as (url, _):
            ours = load(url, "/v1/events", [body], seconds)
        found[f"{many} a request"] = {
            **ours,
            "events_per_second": round(ours["requests_per_second"] * many),
        }
    return found


def memory(seconds: float) -> dict[str, Any]:
    """What one of two workers holds under load, beyond the files of the run: its own, and all that it maps."""
    run = planted_run(100_000)
    with service(run, workers=2) as (url, process):
        load(url, "/v1/recommend", questions(run), min(seconds, 4.0))
        inside = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        held = [held_by(each.pid, run) for each in inside]
    workers = [each for each in held if each["model_mb"] > 0]
    worst = max(workers, key=lambda each: each["own_mb"])
    return {**worst, "workers": len(workers)}


def held_by(pid: int, run: Path) -> dict[str, float]:
    """MiB of a process: its own pages but for those of the run's files; all resident ones likewise; those of the run."""
    own = resident = model = 0
    of_the_run = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name = line.split(" ", 1)[0]
        if not name.endswith(":"):
            of_the_run = str(run) in line
        elif name == "Rss:":
            model, resident = (
                (model + int(line.split()[1]), resident) if of_the_run else (model, resident + int(line.split()[1]))
            )
        elif name in ("Private_Clean:", "Private_Dirty:") and not of_the_run:
            own += int(line.split()[1])
    return {
        "own_mb": round(own / 1024, 1),
        "resident_mb": round(resident / 1024, 1),
        "model_mb": round(model / 1024, 1),
    }


PARTS = {"recommend": recommend, "large": large, "events": events, "memory": memory}


def verdicts(result: dict[str, Any]) -> dict[str, bool]:
    """Which targets are met, of what was measured."""
    said = {}
    if "recommend" in result:
        ours = result["recommend"]["service"]
        most = ours["without_pauses"]["requests_per_second"]
        said["300 requests a second"] = most >= TARGETS["requests_per_second"]
        said[f"p99 under 60 ms at {RATE} a second"] = _kept_up(ours, TARGETS["p99_ms"])
    if "large" in result:
        good = result["large"]["index"]["recall"] >= TARGETS["recall"]
        said["p99 under 100 ms at 1,000,000 items, recall 0.95"] = good and _kept_up(
            result["large"]["service"], TARGETS["large_p99_ms"]
        )
    if "events" in result:
        most = max(each["events_per_second"] for each in result["events"].values())
        said["2,000 events a second"] = most >= TARGETS["events_per_second"]
    if "memory" in result:
        said["a worker under 300 MB beyond the model"] = result["memory"]["own_mb"] < TARGETS["memory_mb"]
    return said


def _kept_up(ours: dict[str, Any], milliseconds: float) -> bool:
    """Whether it answered at the rate that was sent, within the time."""
    paced = ours[f"at_{RATE}_a_second"]
    return bool(paced["requests_per_second"] >= 0.93 * RATE and paced["p99_ms"] < milliseconds and not paced["failed"])


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to measure, by commas")
    chosen = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"clients": CLIENTS, "load_tool": peers.PEERS["locust"][0], "seconds": chosen.seconds}
    for name in chosen.only.split(","):
        result[name] = PARTS[name](chosen.seconds)
        print(f"{name}: {json.dumps(result[name], indent=2)}", flush=True)
    result["load_of_the_machine"] = round(os.getloadavg()[0], 1)
    result["met"] = verdicts(result)
    print(json.dumps(result["met"], indent=2))
    if set(PARTS) <= set(result):
        print(write_result("service", result))


if __name__ == "__main__":
    main()
