"""Checkpoints: what goes in comes out, and what is damaged is refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from torch import nn

from vouch.errors import StorageError
from vouch.training import checkpoints
from vouch.training.checkpoints import load_checkpoint, save_checkpoint

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, betas=(0.8, 0.9), amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, centered=True),
}


def train(model: toy.Toy, optimizer: torch.optim.Optimizer, steps: int) -> None:
    batches = toy.Bags().epoch(toy.np.random.default_rng(0), 0, 1)
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        sum(model.loss(batch).values()).backward()  # type: ignore[union-attr]
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_it_bit_for_bit(name: str, tmp_path: Path) -> None:
    model = toy.Toy(dropout=0.0)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    save_checkpoint(tmp_path / "c", model.state_dict(), {"epoch": 3, "history": [{"loss": 0.1}]}, optimizer)
    train(model, optimizer, 2)

    found = load_checkpoint(tmp_path / "c")
    again = toy.Toy(seed=9, dropout=0.0)
    other = OPTIMIZERS[name](again.parameters())
    again.load_state_dict(found.model)
    other.load_state_dict(found.optimizer)
    train(again, other, 2)
    assert toy.same(again, model)
    assert again.tied is again.item
    assert found.progress == {"epoch": 3, "history": [{"loss": 0.1}]}
    assert set(found.model) == set(model.state_dict()) and found.model["rough"].dtype == torch.bfloat16


def test_a_checkpoint_is_two_files_and_no_pickle(tmp_path: Path) -> None:
    model = toy.Toy()
    for epoch in (1, 2, 2, 10):
        save_checkpoint(tmp_path / "c", model.state_dict(), {"epoch": epoch})
        assert {file.name for file in (tmp_path / "c").iterdir()} == {"checkpoint.json", f"epoch-{epoch}.safetensors"}
    for file in (tmp_path / "c").iterdir():
        assert not re.search(rb"\x80[\x02-\x05]|ctorch|PK\x03\x04", file.read_bytes()[:2000])
    assert load_checkpoint(tmp_path / "c").optimizer == {"state": {}, "param_groups": []}


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"checkpoint\.json"):
        load_checkpoint(tmp_path / "none")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path / "c", model.state_dict(), {"epoch": 4}, torch.optim.SGD(model.parameters(), lr=0.1))
    return tmp_path / "c"


def test_a_newer_format(saved: Path) -> None:
    header = json.loads((saved / "checkpoint.json").read_text())
    (saved / "checkpoint.json").write_text(json.dumps({**header, "format": checkpoints.FORMAT + 1}))
    with pytest.raises(
        StorageError, match=rf"format {checkpoints.FORMAT + 1}.*reads up to {checkpoints.FORMAT}"
    ) as error:
        load_checkpoint(saved)
    assert error.value.hint is not None and "upgrade" in error.value.hint


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_tensors_cut_short(saved: Path, keep: int) -> None:
    file = saved / "epoch-4.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(StorageError, match="damaged"):
        load_checkpoint(saved)


HEADERS = ["", "{", "[]", "3", "null", "{}", '{"format": "one"}', '{"format": 1}', '{"format": 1, "tensors": 7}']


@pytest.mark.parametrize("text", HEADERS)
def test_a_header_that_is_none(saved: Path, text: str) -> None:
    (saved / "checkpoint.json").write_text(text)
    with pytest.raises(StorageError, match=r"damaged|cannot be read as JSON"):
        load_checkpoint(saved)


def test_the_header_cannot_name_a_file_elsewhere(saved: Path) -> None:
    (saved / "epoch-4.safetensors").rename(saved.parent / "epoch-4.safetensors")
    header = json.loads((saved / "checkpoint.json").read_text())
    (saved / "checkpoint.json").write_text(json.dumps({**header, "tensors": "../epoch-4.safetensors"}))
    with pytest.raises(StorageError, match="damaged"):
        load_checkpoint(saved)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot"):
        save_checkpoint(tmp_path / "file" / "c", nn.Linear(1, 1).state_dict(), {"epoch": 1})
