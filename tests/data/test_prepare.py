"""Preparing: what is read, filtered and kept; nothing left behind when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vouch.data import Dataset
from vouch.data.filters import Filters, apply
from vouch.data.prepare import prepare
from vouch.data.readers import read
from vouch.errors import DataError, StorageError

Write = Callable[..., Path]
ROWS = "user,item,time,value\n" + "".join(f"u{k % 7},{k % 5},{100 + k % 11},{1 + k % 5}\n" for k in range(120))


def test_prepared_is_read_and_filtered(write: Write, tmp_path: Path) -> None:
    source, filters, steps = write("log.csv", ROWS), Filters(min_value=3, duplicates="last"), []
    made = prepare(source, tmp_path / "deep/out", filters=filters, name="mine", progress=steps.append)
    expected = apply(read(source), filters).interactions
    assert made.name == "mine"
    assert made.interactions.fingerprint == expected.fingerprint
    assert isinstance(made.interactions.item, np.memmap)
    assert made.interactions.notes["dropped"] == expected.notes["dropped"]
    assert [step.split()[0] for step in steps] == ["reading", "filtering", "writing"]
    again = prepare(tmp_path / "deep/out", tmp_path / "deep/out", filters=Filters(min_value=4))  # over itself
    assert set(again.interactions.value.tolist()) == {4.0, 5.0}
    assert sorted(child.name for child in (tmp_path / "deep").iterdir()) == ["out"]


def test_a_failed_preparation_leaves_nothing(write: Write, tmp_path: Path) -> None:
    for text, filters in ((ROWS + "u1,,5,5\n", None), (ROWS, Filters(min_value=9))):
        with pytest.raises(DataError):
            prepare(write("log.csv", text), tmp_path / "out", filters=filters)
        assert sorted(child.name for child in tmp_path.iterdir()) == ["log.csv"]


def test_a_full_disk_leaves_the_old_data(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write("log.csv", ROWS)
    old = prepare(source, tmp_path / "out").interactions.fingerprint

    def full(*how: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(StorageError, match="No space left"):
        prepare(source, tmp_path / "out", filters=Filters(min_value=4))
    assert Dataset.open(tmp_path / "out").interactions.fingerprint == old
    assert sorted(child.name for child in tmp_path.iterdir()) == ["log.csv", "out"]


def test_an_interrupt_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*how: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vouch.data.catalog.Catalog.save", interrupt)  # the log is written by then
    with pytest.raises(KeyboardInterrupt):
        prepare(write("log.csv", ROWS), tmp_path / "out")
    assert sorted(child.name for child in tmp_path.iterdir()) == ["log.csv"]


def test_places_that_cannot_be_written_are_refused_before_any_work(write: Write, tmp_path: Path) -> None:
    source = write("log.csv", ROWS)
    write("taken/notes.txt", "mine")
    write("file", "mine")
    for out, message in (
        ("taken", "is no prepared dataset"),
        ("file", "not a folder"),
        ("file/in", "not a folder"),
    ):
        with pytest.raises(StorageError, match=message):
            prepare(source, tmp_path / out)
    assert (tmp_path / "taken/notes.txt").read_text() == "mine"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError, match="no permission"):
        prepare(write("log.csv", ROWS), tmp_path / "locked/out")


MEASURE = """
import resource, sys, time
from vouch.data.prepare import prepare
from vouch.data import Dataset
import psutil
if sys.argv[1] == "prepare":
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    prepare(sys.argv[2], sys.argv[3])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
else:
    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    Dataset.open(sys.argv[3]).interactions.history(3)
    print((psutil.Process().memory_info().rss - before) // 1024, time.perf_counter() - begin)
"""


def test_preparing_holds_little_and_opening_holds_nothing(tmp_path: Path) -> None:
    """A million rows with long text: the peak stays far below the text's 200 MB, and opening maps."""
    draw = np.random.default_rng(0)
    n = 1_000_000
    frame = pl.DataFrame(
        {"user": draw.integers(0, 50_000, n), "item": draw.integers(0, 9_000, n), "time": draw.integers(0, 10**9, n)}
    )
    text = pl.col("user").hash(1).cast(pl.String).str.pad_end(200, "x")
    frame.lazy().with_columns(text.alias("review")).sink_parquet(tmp_path / "log.parquet", compression="uncompressed")
    del frame
    run = [sys.executable, "-c", MEASURE]
    used = {}
    for step in ("prepare", "open"):
        done = subprocess.run(
            [*run, step, tmp_path / "log.parquet", tmp_path / "out"], capture_output=True, text=True, check=True
        )
        used[step] = [float(word) for word in done.stdout.split()]
    assert (tmp_path / "log.parquet").stat().st_size > 200e6 / 2
    assert used["prepare"][0] < 150_000  # KiB above the imports
    assert used["open"][0] < 8_000
    assert used["open"][1] < 1.0
    begin = time.perf_counter()
    Dataset.open(tmp_path / "out")
    assert time.perf_counter() - begin < 0.5
