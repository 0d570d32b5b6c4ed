"""Devices, precision, seeds and moving batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from vouch.errors import ConfigError
from vouch.training import Run
from vouch.training.devices import make_fabric, parse_device, seed_of, seeded, to_device, use_bf16


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, auto in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: 2 * there)
        assert parse_device("auto") == (auto, None) and parse_device("cpu") == ("cpu", None)
    assert parse_device("cuda") == ("cuda", None) and parse_device("cuda:1") == ("cuda", 1)
    with pytest.raises(ConfigError, match="'cuda:2' is not there: 2 GPUs found"):
        parse_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "CPU", "cuda:1:2", "mps:0"])
def test_devices_that_do_not_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no device"):
        parse_device(name)


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ConfigError, match="is not there"):
            parse_device(name)


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert use_bf16("bf16", "cpu") and not use_bf16("32", "cuda")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        assert use_bf16("auto", "cuda") is there
    with pytest.raises(ConfigError, match="'16'"):
        make_fabric(Run(device="cpu", precision="16"))  # type: ignore[arg-type]


def test_variables_of_clusters_are_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only torchrun starts processes for us: a shell inside a batch job is one process."""
    for name, value in {
        "WORLD_SIZE": "4", "RANK": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train", "SLURM_PROCID": "1",
        "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS_PER_NODE": "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    fabric = make_fabric(Run(device="cpu"))
    assert (fabric.world_size, fabric.global_rank, fabric.device.type) == (1, 0, "cpu")


def test_seeded() -> None:
    outside = torch.get_rng_state()
    with seeded(4):
        first = torch.rand(3)
    with seeded(4):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), outside)
    with pytest.raises(ConfigError, match="seed is -1"), seeded(-1):
        pass


def test_seeds_of_several_numbers_differ() -> None:
    seeds = {seed_of(run, epoch, rank) for run in range(10) for epoch in range(30) for rank in range(3)}
    assert len(seeds) == 900 and all(0 <= seed < 2**64 for seed in seeds)
    torch.manual_seed(max(seeds))
    assert seed_of(1, 2, 3) == int(np.random.SeedSequence([1, 2, 3]).generate_state(1, np.uint64)[0])


class Named(NamedTuple):
    a: Tensor
    b: Any


@dataclass(frozen=True)
class Frozen:
    a: Tensor
    b: Any


def test_batches_move_whole() -> None:
    meta = torch.device("meta")
    batch = {
        "x": [torch.ones(2)],
        "y": (1, "text", None),
        "z": Named(torch.ones(3), Frozen(torch.ones(1), {"k": torch.ones(2)})),
    }
    moved = to_device(batch, meta)
    assert moved["x"][0].device == meta and moved["y"] == (1, "text", None)
    assert isinstance(moved["z"], Named) and moved["z"].a.shape == (3,)
    assert isinstance(moved["z"].b, Frozen) and moved["z"].b.b["k"].device == meta
    assert batch["z"].a.device.type == "cpu"  # type: ignore[attr-defined]


def test_a_cpu_trains_in_float32_unless_told() -> None:
    assert not use_bf16("auto", "cpu")
    assert use_bf16("bf16", "cpu")
    assert not use_bf16("32", "cuda")
