"""`vouch distil`: several runs become one that the other commands can use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from vouch.cli import distil, train
from vouch.cli.main import main
from vouch.errors import ConfigError, StorageError, UnknownIdError
from vouch.recommenders.runs import open_run

SMALL = [
    f"--set={setting}"
    for setting in ("hidden_size=8", "max_length=6", "epochs=2", "batch_size=8", "meal.adversary=none")
]


def call(*words: object) -> None:
    app = typer.Typer()
    distil.add_to(app)
    train.add_to(app)
    command = typer.main.get_command(app)
    command.main(["distil", *(str(word) for word in words)], standalone_mode=False)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, log_csv: Path, items_csv: Path) -> Path:
    """A folder with the runs `a` and `b`."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, method, more in (("a", "sasrec", []), ("b", "gru4rec", ["--set=recurrent_size=12"])):
        words = ["train", method, "--data", log_csv, "--items", items_csv, "--out", folder / name, *SMALL[:-1], *more]
        assert main([str(word) for word in words]) == 0
    return folder


def test_the_run_is_one_like_any_other(
    taught: Path, tmp_path: Path, vouch: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    call("--teachers", f"{taught}/a,{taught}/b", "--student", "gru4rec", "--out", out, *SMALL, "--json")
    said = json.loads(capsys.readouterr().out)
    assert set(said["teachers"]) == {f"{taught}/a", f"{taught}/b"} and 0 <= said["together"]["MRR"] <= 1
    opened = open_run(out)
    assert opened.header["method"] == "gru4rec" and opened.header["report"]["teachers"] == ["sasrec", "gru4rec"]
    assert opened.header["report"]["label_weight"] == 0 and opened.header["validation"] == said["validation"]
    assert opened.split().describe() == open_run(taught / "a").split().describe()
    shutil.rmtree(out / "checkpoints")
    assert vouch("evaluate", out, "--json").code == 0
    found = vouch("recommend", out, "--history", "sku-1,sku-2", "-k", 3, "--json")
    assert found.code == 0 and len(found.json["recommendations"]) == 3


def test_it_says_what_came_of_it(
    taught: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], log_csv: Path
) -> None:
    call("-t", f"{taught}/b", "--data", log_csv, "--out", tmp_path / "c", *SMALL, "--label-weight", 0.5)
    said = capsys.readouterr()
    assert "their mean answer" in said.out and "sasrec, distilled" in said.out and "vouch evaluate" in said.out
    assert "other data" not in said.err
    assert open_run(tmp_path / "c").header["report"]["label_weight"] == 0.5


def test_it_goes_on_where_it_was(taught: Path, tmp_path: Path) -> None:
    words = ["-t", f"{taught}/a,{taught}/b", *SMALL, "--set=meal.ramp=0"]
    call(*words, "--set=epochs=3", "--out", tmp_path / "whole")
    call(*words, "--set=epochs=1", "--out", tmp_path / "parts")
    call(*words, "--set=epochs=3", "--out", tmp_path / "parts", "--resume")
    whole, parts = (open_run(tmp_path / name) for name in ("whole", "parts"))
    assert parts.header["report"]["epochs"] == 3
    a, b = whole.model.state(), parts.model.state()
    assert all((a[name] == b[name]).all() for name in a)


def test_it_refuses(taught: Path, tmp_path: Path, log_csv: Path, markov_run: Path) -> None:
    pair, out = f"{taught}/a,{taught}/b", tmp_path / "c"
    other = tmp_path / "other"
    assert main(["train", "gru4rec", "--data", str(log_csv), "--out", str(other), "--split", "ratio", *SMALL[:-1]]) == 0
    cases: list[tuple[type[Exception], str, list[Any]]] = [
        (ConfigError, "names no run", ["-t", ","]),
        (StorageError, "there is no run", ["-t", tmp_path / "none"]),
        (ConfigError, "'popularity' cannot be a student", ["-t", pair, "--student", "popularity"]),
        (ConfigError, "'meal' cannot be a student", ["-t", pair, "--student", "meal"]),
        (UnknownIdError, "no method 'gru'", ["-t", pair, "--student", "gru"]),
        (ConfigError, "reads 6 items and the student 50", ["-t", pair]),
        (ConfigError, r"teacher 1 \(markov\) has no output", ["-t", markov_run, *SMALL]),
        (ConfigError, "was split by ratio", ["-t", f"{pair},{other}", *SMALL]),
        (ConfigError, "has no setting 'tap'", ["-t", pair, *SMALL, "--set=meal.tap=1"]),
    ]
    for kind, says, words in cases:
        with pytest.raises(kind, match=says):
            call(*words, "--out", out)
        assert not out.exists()
    with pytest.raises(ConfigError, match="is one of the teachers"):
        call("-t", pair, "--out", taught / "a")
    with pytest.raises(ConfigError, match="label_weight is 2"):
        call("-t", pair, *SMALL, "--label-weight", 2, "--out", out)
