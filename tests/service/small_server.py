"""A service over an engine that costs nothing, for tests that need a real server process, or several."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vouch.errors import StorageError, UnknownIdError
from vouch.service import server
from vouch.service.app import create_app
from vouch.service.config import ServiceConfig
from vouch.service.logs import write_json_logs


class Recommended:
    def __init__(self, item: str, score: float, fallback: bool) -> None:
        self.item, self.score, self.fallback = item, score, fallback


class PlainEngine:
    """Twenty items; recommends those that the history does not hold, in their order. No torch is loaded."""

    n_items = 20

    def __init__(self, path: Path) -> None:
        if (path / "broken").exists():
            raise StorageError("the weights are truncated", where=str(path))
        if (path / "slow").exists():
            (path / "opening").touch()
            time.sleep(30)
        self.name, self.fingerprint = path.name, f"fingerprint of {path.name}"
        self.items = [f"i{n}" for n in range(self.n_items)]

    def codes(self, items: Sequence[str]) -> Any:
        known = {item: code for code, item in enumerate(self.items)}
        return np.array([known.get(item, -1) for item in items], dtype=np.int64)

    def knows_user(self, user: str) -> bool:
        return user == "known"

    def history(self, user: str) -> list[str]:
        return ["i0", "i1"] if user == "known" else []

    def check(self, question: Any) -> None:
        pass

    def recommend(self, questions: Sequence[Any]) -> list[list[Recommended]]:
        answers = []
        for question in questions:
            closed = set(question.exclude) | (set() if question.repeat else set(question.history))
            codes = range(self.n_items) if question.allowed is None else np.flatnonzero(question.allowed)
            names = [self.items[code] for code in codes if self.items[code] not in closed]
            empty = not any(item in self.items for item in question.history)
            answers.append([Recommended(name, -float(place), empty) for place, name in enumerate(names[: question.k])])
        return answers

    def similar(self, item: str, k: int, allowed: Any = None) -> list[Recommended]:
        return [Recommended(each, 0.5, False) for each in self.items if each != item][:k]

    def explain_all(self, history: Any, items: Any, user: str | None, n: int) -> list[Any]:
        return [[] for _ in items]

    def evidence(self, history: list[str], item: str, user: str | None) -> None:
        return None

    def mask(self, filters: Sequence[Any]) -> Any:
        raise UnknownIdError("there is no attribute of that name")

    def item(self, item: str) -> dict[str, Any]:
        return {"title": item.upper(), "attributes": {}, "picture": None}

    def card(self) -> dict[str, Any]:
        return {"name": self.name}


def application() -> Any:
    write_json_logs()
    return create_app(ServiceConfig.from_environment(), PlainEngine)


def run(environment: dict[str, str], log: Path) -> None:
    """Serve in this process, which was started for it."""
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (until the end)
    server._config = None
    server.listen(ServiceConfig.from_environment(), "small_server:application")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to become true, or fail."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.05)


if __name__ == "__main__":
    server.listen(ServiceConfig.from_environment(), "small_server:application")
