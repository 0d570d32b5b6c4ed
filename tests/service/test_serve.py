"""`vouch serve`, `vouch keys`, and the settings of the service."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")


from fastapi.testclient import TestClient
from small_server import free_port, wait_until

from vouch.cli.main import main
from vouch.errors import ConfigError
from vouch.service import server
from vouch.service.config import PREFIX, ServiceConfig


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServiceConfig]:
    """What would be served."""
    found: list[ServiceConfig] = []
    monkeypatch.setattr(server, "serve", lambda config, **more: found.append(config))
    return found


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    told = capsys.readouterr()
    return code, told.out, told.err


# Settings -----------------------------------------------------------------------------------------------------------


def test_settings_pass_through_the_environment(tmp_path: Path) -> None:
    config = ServiceConfig(run=tmp_path, port=1, hosts=("a", "b"), requests_per_second=2.5, keys="off")
    assert ServiceConfig.from_environment(config.to_environment()) == config
    assert ServiceConfig.from_environment({}) == ServiceConfig()
    assert ServiceConfig.from_environment({f"{PREFIX}PORT": "7"}, port=8).port == 8


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [("PROT", "1", "VOUCH_SERVICE_PORT"), ("PORT", "http", "port"), ("PORT", "65536", "port")],
)
def test_a_variable_that_does_not_fit_is_told(variable: str, value: str, named: str) -> None:
    with pytest.raises(ConfigError) as told:
        ServiceConfig.from_environment({PREFIX + variable: value})
    assert named in str(told.value)


@pytest.mark.parametrize(
    ("host", "keys", "needed", "hosts"),
    [
        ("127.0.0.1", "auto", False, ("127.0.0.1", "::1", "localhost", "[::1]")),
        ("127.0.0.1", "required", True, ("127.0.0.1", "::1", "localhost", "[::1]")),
        ("0.0.0.0", "auto", True, ("*",)),
        ("0.0.0.0", "off", False, ("*",)),
    ],
)
def test_keys_and_hosts_follow_the_address(host: str, keys: Any, needed: bool, hosts: tuple[str, ...]) -> None:
    config = ServiceConfig(host=host, keys=keys)
    assert config.needs_keys is needed
    assert config.allowed_hosts == hosts
    assert ServiceConfig(host=host, keys=keys, hosts=("shop.example",)).allowed_hosts == ("shop.example",)


def test_the_database_lies_beside_the_run_unless_named(tmp_path: Path) -> None:
    assert ServiceConfig(run=tmp_path / "best").database_url == f"sqlite:///{tmp_path}/service.db"
    assert ServiceConfig(run=tmp_path, database="postgresql://h/d").database_url == "postgresql://h/d"


def test_the_manual_names_every_setting_and_every_route(client: TestClient) -> None:
    text = (Path(__file__).parents[2] / "docs" / "guide" / "serve.md").read_text(encoding="utf-8")
    for row in ServiceConfig.rows():
        assert f"`{row.name}`" in text, row.name
    for path in client.get("/v1/openapi.json").json()["paths"]:
        if path.startswith("/v1"):
            assert path.partition("{")[0].rstrip("/") in text, path


# The commands -------------------------------------------------------------------------------------------------------


def test_options_become_settings(
    served: list[ServiceConfig], runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{PREFIX}WORKERS", "3")
    code, _, _ = said(
        capsys, "serve", runs / "best", "--port", 9, "--index", "exact", "--set", "max_body=5000", "--set", "hosts=a,b"
    )
    assert code == 0
    assert served == [
        ServiceConfig(run=runs / "best", port=9, workers=3, index="exact", max_body=5_000, hosts=("a", "b"))
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--set", "max_boody=5"), "max_body"),
        (("--set", "max_body=lots"), "max_body"),
        (("--port", "70000"), "port"),
        (("--keys", "perhaps"), "keys"),
        (("--index", "fast"), "index"),
    ],
)
def test_options_that_do_not_fit_are_told(
    served: list[ServiceConfig], runs: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], named: str
) -> None:
    code, _, told = said(capsys, "serve", runs / "best", *words)
    assert code == 2
    assert named in told
    assert not served


def test_an_open_address_is_warned_about(
    served: list[ServiceConfig], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "vouch keys add" in said(capsys, "serve", runs / "best", "--host", "0.0.0.0")[2]
    assert "no keys are asked for" in said(capsys, "serve", runs / "best", "--host", "0.0.0.0", "--keys", "off")[2]
    said(capsys, "keys", "add", runs / "best", "me", "--role", "admin")
    assert "vouch keys add" not in said(capsys, "serve", runs / "best", "--host", "0.0.0.0")[2]


@pytest.mark.parametrize("damage", ["none", "unfinished", "weights", "newer", "database", "in memory"])
def test_what_cannot_be_served_is_told_before_anything_starts(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setattr(server, "listen", lambda *given: pytest.fail("it listened"))
    run, more = runs / "best", []
    if damage == "none":
        run = runs / "nothing"
    elif damage == "unfinished":
        (run / "run.json").unlink()
    elif damage == "weights":
        weights = run / "model" / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "newer":
        (run / "run.json").write_text((run / "run.json").read_text().replace('"format": 1', '"format": 99', 1))
    elif damage == "database":
        (runs / "service.db").write_bytes(b"no database" * 99)
    else:
        more = ["--database", "sqlite://"]
    code, _, told = said(capsys, "serve", run, *more)
    assert code == 2
    assert told.count("error:") == 1
    assert "try:" in told


def test_a_taken_port_is_told_in_words(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        code, _, told = said(capsys, "serve", runs / "best", "--port", other.getsockname()[1])
    assert code == 2
    assert "Address already in use" in told and "choose another --port" in told
    assert "serving" not in told


def test_the_port_chosen_for_0_is_told_and_the_run_is_measured_once(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr(server, "listen", lambda config, application, address: taken.append(address.getsockname()[1]))
    code, _, told = said(capsys, "serve", runs / "best", "--port", 0)
    assert code == 0
    assert taken[0] > 0 and f"http://127.0.0.1:{taken[0]} " in told
    assert "test," not in told and not list(runs.glob("best/serving/*/test.json"))

    first = said(capsys, "serve", runs / "best", "--port", 0, "--measure")[2]
    assert "measuring" in first and "NDCG@10" in first
    (kept,) = runs.glob("best/serving/*/test.json")
    assert {"metrics", "groups"} <= json.loads(kept.read_text()).keys()
    again = said(capsys, "serve", runs / "best", "--port", 0, "--measure")[2]
    assert "measuring" not in again and "NDCG@10" in again


def test_no_key_is_made_for_a_run_that_is_not_there(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, told = said(capsys, "keys", "add", runs / "bset", "shop")
    assert code == 2 and out == ""
    assert "there is no run" in told
    assert said(capsys, "keys", "list", runs / "best")[2].startswith("there are no keys yet")


def test_keys_are_added_listed_and_removed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, key, _ = said(capsys, "keys", "add", runs / "best", "shop [bold]", "--role", "write")
    assert code == 0
    _, id, secret = key.strip().split("_", 2)
    listed = json.loads(said(capsys, "keys", "list", runs / "best", "--json")[1])
    assert [(each["id"], each["name"], each["role"]) for each in listed] == [(id, "shop [bold]", "write")]
    table = said(capsys, "keys", "list", runs / "best")[1]
    assert id in table and secret not in table
    assert said(capsys, "keys", "remove", runs / "best", id)[0] == 0
    assert said(capsys, "keys", "remove", runs / "best", id)[0] == 2
    assert said(capsys, "keys", "add", runs / "best", "x", "--role", "root")[0] == 2
    assert said(capsys, "keys", "add", runs / "best", "")[0] == 2


def test_a_missing_extra_is_named(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, told = said(capsys, "serve", runs / "best")
    assert code == 2
    assert 'pip install "vouch[service]"' in told


def test_help_loads_nothing_of_the_service() -> None:
    code = (
        "import sys; from vouch.cli.main import main; main(['serve', '--help']);"
        "heavy = {'fastapi', 'uvicorn', 'sqlalchemy', 'torch', 'alembic'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vouch serve runs/best" in done.stdout


class Running:
    """A server process of its own."""

    def __init__(self, words: list[Any], log: Path, port: int, **environment: str) -> None:
        self.log, self.port = log, port
        with open(log, "wb") as file:
            known = os.environ | {"OMP_NUM_THREADS": "1", **environment}
            self.process = subprocess.Popen([str(word) for word in words], stderr=file, env=known)
        try:
            wait_until(self._ready, 90)
        except BaseException:
            self.process.kill()
            raise

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        address = f"http://127.0.0.1:{self.port}{path}"
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read()) if path.startswith("/v1") else answer.read().decode()

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return bool(self.get("/readyz"))
        return False

    def stop(self) -> str:
        """Tell it to stop, and give its log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) in (0, -signal.SIGTERM)
        told = self.log.read_text()
        assert "Traceback" not in told
        return told


def test_a_run_is_served_until_told_to_stop(runs: Path) -> None:
    port = free_port()
    words = [Path(sys.executable).with_name("vouch"), "serve", runs / "best", "--port", port]
    running = Running(words, runs / "log", port)
    best = running.get("/v1/recommend", {"user": "u1", "k": 3, "reasons": 1})["recommendations"]
    assert len(best) == 3
    assert best[0]["reasons"]
    told = running.stop()
    assert told.startswith(f"serving {runs / 'best'}")
    assert told.count('"event": "stopped"') == 1
    assert "%" not in told


def test_two_workers_share_events_and_count_together(tmp_path: Path) -> None:
    (tmp_path / "best").mkdir()
    port = free_port()
    config = ServiceConfig(run=tmp_path / "best", port=port, workers=2, requests_per_second=0)
    words = [sys.executable, Path(__file__).with_name("small_server.py")]
    running = Running(words, tmp_path / "log", port, **config.to_environment())
    wait_until(lambda: running.log.read_text().count('"event": "started"') == 2, 60)
    for number in range(30):  # whichever worker answers
        event = {"id": f"{number}", "user": "new", "item": "i1"}
        assert running.get("/v1/events", {"events": [event]})["accepted"] == 1
        assert len(running.get("/v1/users/history", {"user": "new"})["items"]) == number + 1
    text = running.get("/metrics")
    assert "vouch_events_total 30.0" in text
    assert 'vouch_requests_total{route="/v1/events",status="200"} 30.0' in text
    assert running.stop().count('"event": "stopped"') == 2
