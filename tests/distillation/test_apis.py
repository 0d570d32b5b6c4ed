"""The boundary to prediction services: counts, budgets, patience, and what is made of bad answers; over real HTTP too."""

from __future__ import annotations

import io
import json
import math
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vouch.distillation.apis import FLOOR, Api, ApiError, Ledger, NotServedError, network_service
from vouch.distillation.httpservice import HttpService
from vouch.errors import ConfigError, StorageError

SHAPE = (1, 2, 2)


def pictures(n: int) -> torch.Tensor:
    return torch.linspace(-1, 1, n * 4).view(n, *SHAPE)


def soft(x: np.ndarray) -> np.ndarray:
    p = 0.5 + 0.4 * x.reshape(len(x), -1).mean(1)
    return np.stack([p, 1 - p], 1)


class Counting:
    """A service that counts what reaches it, and misbehaves on demand."""

    def __init__(self, *script: Any) -> None:
        self.rows, self.script = 0, list(script)

    def __call__(self, x: np.ndarray) -> Any:
        self.rows += len(x)
        act = self.script.pop(0) if self.script else None
        if isinstance(act, BaseException):
            raise act
        return soft(x) if act is None else act(x)


def api(service: Any, **settings: Any) -> Api:
    waited: list[float] = []
    found = Api(service, ("a", "b"), SHAPE, "one", sleep=waited.append, **settings)
    found.waited = waited  # type: ignore[attr-defined]
    return found


def test_the_ledger_equals_the_rows_that_reached_the_service() -> None:
    service, ledger = Counting(OSError("down"), None, None, ValueError("?")), Ledger()
    one = api(service, max_rows=3, cost=0.5)
    answers = one.ask(pictures(8), "model", ledger)
    one.ask(pictures(2), "other", ledger)
    assert answers.shape == (8, 2) and np.allclose(answers.numpy(), soft(pictures(8).numpy()), atol=1e-6)
    assert ledger.queries() == ledger.queries("one") == service.rows == 8 + 3 + 2 + 2
    assert ledger.queries(phase="other") == 2 and ledger.queries("two") == 0
    assert ledger.cost == 0.5 * 15
    assert [(r["phase"], r["queries"], r["failed"]) for r in ledger.rows] == [("model", 13, 5), ("other", 2, 0)]


@pytest.mark.parametrize("budget", [1, 7, 10])
def test_no_more_rows_than_the_budget_ever_arrive(budget: int) -> None:
    """With requests that fail, in requests of any size, over several calls."""
    service, ledger = Counting(OSError(), None, OSError()), Ledger()
    one = api(service, budget=budget, max_rows=3, attempts=2)
    got = 0
    for _ in range(6):
        try:
            got += len(one.ask(pictures(4), "model", ledger))
        except ApiError as error:
            assert "failed tries spent the budget" in str(error)
    assert service.rows == ledger.queries() == budget
    assert ledger.left(one) == 0 and got < budget
    assert one.ask(pictures(4), "model", ledger).shape == (0, 2)
    assert service.rows == budget


def test_a_request_that_was_not_taken_on_is_not_counted() -> None:
    ledger = Ledger()
    one = api(Counting(NotServedError("busy", wait=7.0), NotServedError("busy")), backoff=2.0)
    one.ask(pictures(3), "model", ledger)
    assert ledger.queries() == 3
    assert one.waited == [7.0, 4.0]  # type: ignore[attr-defined]


def test_it_gives_up_after_all_attempts_and_at_once_when_refused() -> None:
    service, ledger = Counting(*[OSError("down")] * 9), Ledger()
    one = api(service, attempts=3)
    with pytest.raises(ApiError, match="does not answer: OSError: down") as caught:
        one.ask(pictures(2), "model", ledger)
    assert "attempt 3 of 3" in str(caught.value) and one.waited == [1.0, 2.0]  # type: ignore[attr-defined]
    assert ledger.queries() == service.rows == 6 and ledger.rows[0]["failed"] == 6
    refused = api(Counting(NotServedError("HTTP 401", again=False)))
    with pytest.raises(ApiError, match="401"):
        refused.ask(pictures(2), "model", ledger)
    assert ledger.queries() == 6 and refused.waited == []  # type: ignore[attr-defined]


def test_the_rate_limit_is_kept() -> None:
    now = [0.0]
    sent: list[float] = []

    def service(x: np.ndarray) -> np.ndarray:
        sent.append(now[0])
        return soft(x)

    def sleep(seconds: float) -> None:
        now[0] += seconds

    one = Api(service, ("a", "b"), SHAPE, "one", rate=4.0, max_rows=1, clock=lambda: now[0], sleep=sleep)
    one.ask(pictures(5), "model", Ledger())
    assert np.diff(sent) == pytest.approx(np.full(4, 0.25))


def test_pictures_that_do_not_fit_cost_nothing() -> None:
    service, ledger = Counting(), Ledger()
    for x in (torch.zeros(2, 1, 3, 2), 1.5 * torch.ones(2, *SHAPE), torch.full((2, *SHAPE), math.nan)):
        with pytest.raises(ConfigError, match="one"):
            api(service).ask(x, "model", ledger)
    assert service.rows == ledger.queries() == 0


def test_no_gradient_and_no_memory_passes_the_boundary() -> None:
    seen: list[np.ndarray] = []

    def service(x: np.ndarray) -> np.ndarray:
        assert type(x) is np.ndarray and x.dtype == np.float32
        seen.append(x)
        answer = soft(x)
        x[:] = 9  # what a service does to its copy is its own business
        return answer

    x = pictures(3).requires_grad_()
    answers = api(service).ask(x, "model", Ledger())
    assert not answers.requires_grad and float(x.detach().abs().max()) <= 1 and seen


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda x: soft(x)[:, :1], r"\(4, 1\), not \(4, 2\)"),
        (lambda x: soft(x)[:-1], r"\(3, 2\), not \(4, 2\)"),
        (lambda x: np.full((4, 2), math.nan), "no probabilities.*nan"),
        (lambda x: np.array([[0.5, 0.5]] * 3 + [[math.inf, 0.2]]), "no probabilities.*inf"),
        (lambda x: np.array([[2.0, -1.0]] * 4), "no probabilities.*-1"),
        (lambda x: np.zeros((4, 2)), "no probabilities"),
        (lambda x: [["cat", "dog"]] * 4, "no numbers"),
        (lambda x: [[0.5, 0.5], [1.0]] * 2, "no numbers"),
        (lambda x: None, "answers 4 pictures with"),
        (lambda x: np.array([0, 1, 1, 0]), "labels only"),
    ],
)
def test_answers_that_are_no_probabilities_are_errors(answer: Callable[..., Any], says: str) -> None:
    ledger = Ledger()
    with pytest.raises(ApiError, match=says):
        api(Counting(answer)).ask(pictures(4), "model", ledger)
    assert ledger.queries() == 4  # they arrived


def test_labels_only_are_refused_again_and_again() -> None:
    one, ledger = api(lambda x: np.eye(2)[(soft(x)[:, 0] > 0.5).astype(int)]), Ledger()
    for _ in range(2):
        with pytest.raises(ApiError, match="labels only"):
            one.ask(pictures(40), "model", ledger)


def test_sums_and_zeros_are_mended_with_one_warning() -> None:
    one, ledger = api(lambda x: np.tile([2.0, 0.0], (len(x), 1))), Ledger()
    with pytest.warns(UserWarning, match="clipped and renormalised") as seen:
        first = one.ask(pictures(3), "model", ledger)
        one.ask(pictures(3), "model", ledger)
    assert len(seen) == 1
    expected = np.array([1.0, FLOOR]) / (1 + FLOOR)
    assert np.allclose(first.numpy(), expected, rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        api(Counting()).ask(pictures(3), "model", ledger)


@pytest.mark.parametrize(
    "settings",
    [{"classes": ("a",)}, {"classes": ("a", "a")}, {"shape": (2, 2)}, {"budget": 0}, {"attempts": 0}, {"rate": 0.0}],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Api(**{"service": soft, "classes": ("a", "b"), "shape": SHAPE, "name": "one", **settings})


def test_a_torch_network_as_a_service_keeps_its_mode() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 2)).train()
    one = api(network_service(net))
    a, b = (one.ask(pictures(5), "model", Ledger()) for _ in range(2))
    assert torch.equal(a, b) and net.training
    assert torch.allclose(a, net.eval()(pictures(5)).softmax(1), atol=1e-6)


# ---- the ledger's file


def test_the_ledger_outlives_the_process_and_a_write_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "run" / "ledger.jsonl"
    ledger, one = Ledger(path), api(Counting(OSError()), budget=10, cost=2.0)
    one.ask(pictures(2), "model", ledger)
    with path.open("a") as file:
        file.write('{"api": "one", "phase": "mod')
    again = Ledger(path)
    assert again.rows == ledger.rows and again.left(one) == 6 and again.cost == 8.0
    one.ask(pictures(9), "model", again)
    assert Ledger(path).left(one) == 0
    path.write_text('{"api": "one"}\n')
    with pytest.raises(StorageError, match="damaged"):
        Ledger(path)


def test_a_ledger_that_moves_to_a_file_adds_up(tmp_path: Path) -> None:
    path, one = tmp_path / "ledger.jsonl", api(Counting())
    one.ask(pictures(3), "model", Ledger(path))
    other = Ledger()
    one.ask(pictures(2), "model", other)
    one.ask(pictures(2), "raw", other)
    other.keep_in(path)
    other.keep_in(tmp_path / "." / "ledger.jsonl")  # the same file: nothing is counted twice
    assert other.queries() == Ledger(path).queries() == 7
    other.at_least([{"api": "one", "phase": "model", "queries": 9, "failed": 1, "cost": 0.0}])
    other.at_least([{"api": "one", "phase": "model", "queries": 4, "failed": 0, "cost": 0.0}])
    assert other.queries(phase="model") == Ledger(path).queries(phase="model") == 9


def test_rows_are_written_down_before_they_are_sent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"

    def crash(x: np.ndarray) -> None:
        assert Ledger(path).queries() == len(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        api(crash).ask(pictures(3), "model", Ledger(path))
    assert Ledger(path).queries() == 3


# ---- over HTTP


class Server:
    """A local HTTP server whose next answers can be set; it counts rows and requests."""

    def __init__(self) -> None:
        self.rows, self.requests, self.script, self.headers = 0, 0, [], []  # type: ignore[var-annotated]
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.answer(self)

            def do_GET(self) -> None:
                outer.requests += 1
                self.send_error(404)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/predict"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        self.requests += 1
        self.headers.append(dict(handler.headers))
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        npy = handler.headers["Content-Type"] == "application/x-npy"
        x = np.load(io.BytesIO(body)) if npy else np.array(json.loads(body)["inputs"])
        act = self.script.pop(0) if self.script else None
        if act is not None:
            act(handler)
            return
        self.rows += len(x)
        buffer = io.BytesIO()
        np.save(buffer, soft(x))
        self.send(handler, buffer.getvalue() if npy else json.dumps({"probabilities": soft(x).tolist()}).encode())

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, body: bytes, code: int = 200, **headers: str) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


@pytest.mark.parametrize("kind", ["json", "npy"])
def test_a_service_over_http(server: Server, kind: Any) -> None:
    ledger = Ledger()
    one = api(HttpService(server.url, kind, headers={"Authorization": "Bearer s3cret"}), max_rows=4, budget=9)
    answers = one.ask(pictures(12), "model", ledger)
    assert np.allclose(answers.numpy(), soft(pictures(12).numpy())[:9], atol=1e-6)
    assert server.rows == ledger.queries() == 9 and server.requests == 3
    assert server.headers[0]["Authorization"] == "Bearer s3cret" and "s3cret" not in repr(one)


def code(number: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: Server.send(handler, b"no", number, **headers)


def test_busy_broken_and_refusing_servers(server: Server) -> None:
    ledger = Ledger()
    server.script = [code(429, Retry_After="6"), code(503), code(500), None]
    one = api(HttpService(server.url), attempts=4)
    assert len(one.ask(pictures(3), "model", ledger)) == 3
    assert one.waited == [6.0, 2.0, 4.0]  # type: ignore[attr-defined]
    assert ledger.queries() == 6 and ledger.rows[0]["failed"] == 3  # the 500 may have been served
    for refusal in (code(403), code(302, Location=server.url)):
        before = server.requests
        server.script = [refusal]
        with pytest.raises(ApiError, match=r"HTTP (403|302)"):
            one.ask(pictures(3), "model", ledger)
        assert server.requests == before + 1  # neither tried again nor followed
    assert ledger.queries() == 6


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"not json", "JSONDecodeError"),
        (b'{"error": "no"}', "no numbers"),
        (b"[[0.5, NaN], [0.5, 0.5]]", "no probabilities"),
        (b"[[0.5, null], [0.5, 0.5]]", "no probabilities"),
        (b"[[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]]", r"\(2, 3\), not \(2, 2\)"),
    ],
)
def test_bodies_that_are_no_answers(server: Server, body: bytes, says: str) -> None:
    server.script = [lambda handler: Server.send(handler, body)] * 2
    with pytest.raises(ApiError, match=says):
        api(HttpService(server.url), attempts=2).ask(pictures(2), "model", Ledger())


def test_timeouts_count_and_are_tried_again(server: Server) -> None:
    """One answer comes too late, one in drops, one breaks off; the last try is answered."""

    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.4)

    def drops(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(40):
            try:
                handler.wfile.write(b" ")
                handler.wfile.flush()
            except OSError:
                return
            time.sleep(0.02)

    def broken(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"[[0.5, 0.5]")

    server.script = [late, drops, broken]
    ledger, begin = Ledger(), time.perf_counter()
    one = api(HttpService(server.url, timeout=0.15), attempts=4)
    assert len(one.ask(pictures(2), "model", ledger)) == 2
    assert time.perf_counter() - begin < 2.0
    assert ledger.queries() == 8 and ledger.rows[0]["failed"] == 6


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ledger = Ledger()
    with pytest.raises(ApiError, match="does not answer"):
        api(HttpService(f"http://127.0.0.1:{port}/"), attempts=2).ask(pictures(2), "model", ledger)
    assert ledger.queries() == 0


@pytest.mark.parametrize("settings", [{"url": "ftp://x"}, {"url": "x"}, {"format": "pickle"}, {"timeout": 0.0}])
def test_addresses_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        HttpService(**{"url": "http://127.0.0.1/", **settings})
