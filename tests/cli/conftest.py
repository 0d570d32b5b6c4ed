"""Fixtures of the command line's tests: a small log, a finished run, and the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from vouch.cli.main import main

ITEMS = [f"sku-{n}" for n in range(12)]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def vouch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Said]:
    """Run the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> Said:
        capsys.readouterr()
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def log_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty users who each walk six steps round a ring of twelve items, from where they please."""
    path = tmp_path_factory.mktemp("log") / "log.csv"
    rows = [f"u{user},{ITEMS[(user + step) % 12]},{100 * user + step}" for user in range(20) for step in range(6)]
    path.write_text("user,item,time\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def items_csv(log_csv: Path) -> Path:
    path = log_csv.with_name("items.csv")
    path.write_text("item,title\n" + "".join(f"{sku},Thing {n}\n" for n, sku in enumerate(ITEMS)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def markov_run(tmp_path_factory: pytest.TempPathFactory, log_csv: Path, items_csv: Path) -> Iterator[Path]:
    """A run that has learned the ring."""
    out = tmp_path_factory.mktemp("runs") / "markov"
    assert main(["train", "markov", "--data", str(log_csv), "--items", str(items_csv), "--out", str(out)]) == 0
    yield out
