"""Two processes train as one does; a killed one goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import toy


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """The same global batches give the same losses, although the processes have different numbers of targets."""
    for world in (1, 2):
        (tmp_path / str(world)).mkdir()
    alone = run(toy.__file__, "processes", str(tmp_path / "1"))
    assert alone.returncode == 0, alone.stderr
    two = run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        toy.__file__, "processes", str(tmp_path / "2"),
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    one, both = (json.loads((tmp_path / world / "report.json").read_text()) for world in ("1", "2"))
    for name in ("toy", "alternating", "sasrec"):
        np.testing.assert_allclose(both[name], one[name], atol=1e-4, err_msg=name)
        assert one[name][-1] < one[name][0] - 1e-3, f"{name} learned nothing: the comparison says nothing"
    np.testing.assert_allclose(both["weights"], one["weights"], atol=1e-4)
    assert one["stopped"] == both["stopped"] == "time"
    assert one["bpr"] == both["bpr"] == [True, True]
    logs = [(tmp_path / world / "toy" / "log.jsonl").read_text().splitlines() for world in ("1", "2")]
    for a, b in zip(*(map(json.loads, lines) for lines in logs), strict=True):  # one writer, every step once
        assert (a["step"], a["epoch"]) == (b["step"], b["epoch"])
        assert a.get("entropy", 0) == pytest.approx(b.get("entropy", 0), abs=1e-4)


def test_killed_and_resumed_is_as_if_nothing_had_been(tmp_path: Path) -> None:
    killed = run(toy.__file__, "killed", str(tmp_path / "killed"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    model, report = toy.train(tmp_path / "killed", resume=True)
    whole, expected = toy.train(tmp_path / "whole")
    assert toy.same(model, whole)
    assert toy.learned(report) == toy.learned(expected)
    lines = [
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    for row in (row for rows in lines for row in rows):
        row.pop("seconds", None)
    assert lines[0] == lines[1]
