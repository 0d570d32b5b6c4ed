"""BPR-MF and APR learn in two processes what they learn in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vouch import Dataset, Interactions, Run, split
from vouch.recommenders.collaborative.apr import APR
from vouch.recommenders.collaborative.bpr import BPR


def learned() -> dict[str, Any]:
    """The vectors of both methods; 33 of 100 pairs in the last batch, so that the processes' shares are uneven."""
    random = np.random.default_rng(1)
    item = np.concatenate([random.choice(60, 7, replace=False) for _ in range(20)])
    made = split(Dataset.of(Interactions.from_arrays(np.repeat(np.arange(20), 7), item)))
    run = Run(device="cpu", precision="32")
    # Batches of 11 touch few of the items, so that one process works on rows and two on whole tables.
    common: dict[str, Any] = {"hidden_size": 4, "batch_size": 11, "monitor": "NDCG@10", "evaluate_every": 3}
    bpr = BPR(epochs=3, regularization=0.1, init_std=0.5, **common)
    bpr.fit(made, run)
    out = {"bpr": bpr.factors}
    for norm in ("row", "global"):
        apr = APR(adversarial_epochs=3, eps=0.5, norm=norm, **common)
        apr.fit(made, run, start=bpr.factors)
        out[norm] = apr.factors
    return {name: torch.cat([factors.user, factors.item]).detach().numpy() for name, factors in out.items()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_two_processes_learn_the_same(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    both, alone = np.load(tmp_path / "learned.npz"), learned()
    for name, vectors in alone.items():
        np.testing.assert_allclose(both[name], vectors, atol=1e-4, err_msg=name)
    assert np.abs(alone["bpr"] - alone["row"]).max() > 0.05
    assert np.abs(alone["row"] - alone["global"]).max() > 1e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = learned()
    if os.environ["RANK"] == "0":
        np.savez(Path(sys.argv[1]) / "learned.npz", **found)
