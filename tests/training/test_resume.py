"""Resuming: whatever the moment of death, the end is the same; and what cannot be resumed says so."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from vouch.errors import ConfigError, StorageError
from vouch.training import Run, TrainConfig, checkpoints, fit, loop


@pytest.fixture(autouse=True)
def _save_every_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SAVING_SHARE", float("inf"))


@pytest.fixture(autouse=True)
def _ctrl_c_interrupts() -> Iterator[None]:
    """Also where the tests run in the background, as a shell's `&` does: there it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole() -> tuple[toy.Toy, Any]:
    return toy.train()


def in_a_child(target: Any, *args: Any) -> int | None:
    """Run in a process of its own; its exit code."""
    child = multiprocessing.get_context("forkserver").Process(target=_in_the_child, args=(target, *args))
    child.start()
    child.join(60)
    return child.exitcode


def _in_the_child(target: Any, *args: Any) -> None:
    torch.set_num_threads(1)  # as here: the result shall agree bit for bit
    loop.SAVING_SHARE = float("inf")
    target(*args)


def _die_while_saving(path: Path, moment: int) -> None:
    """SIGKILL just before or just after the nth time that a file is put in its place."""
    real, calls = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if 2 * calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)
        if 2 * calls == moment + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace  # type: ignore[assignment]
    toy.train(path)


@pytest.mark.parametrize("moment", range(1, 12))
def test_killed_while_saving(moment: int, tmp_path: Path, whole: tuple[toy.Toy, Any]) -> None:
    """At any of the renames that make a checkpoint: the first may find nothing yet, later ones go on."""
    assert in_a_child(_die_while_saving, tmp_path, moment) == -signal.SIGKILL
    model, report = toy.train(tmp_path, resume=True)
    assert toy.same(model, whole[0])
    assert toy.learned(report) == toy.learned(whole[1])
    for kind in ("best", "last"):  # nothing is left lying about
        assert len(list((tmp_path / "checkpoints" / kind).iterdir())) == 2


@pytest.mark.parametrize("epoch", [1, 2, 5])
def test_ctrl_c(epoch: int, tmp_path: Path, whole: tuple[toy.Toy, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, interrupt=(signal.SIGINT, epoch, 2))
    if epoch > 1:
        saved = checkpoints.load_checkpoint(tmp_path / "checkpoints" / "last")
        assert saved.progress["epoch"] == epoch - 1
    model, report = toy.train(tmp_path, resume=True)
    assert toy.same(model, whole[0]) and toy.learned(report) == toy.learned(whole[1])


def test_ctrl_c_leaves_the_best_weights_in_the_model(tmp_path: Path) -> None:
    model = toy.Toy()
    found: list[dict[str, Any]] = []

    def validate() -> dict[str, float]:
        found.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"hit": [0.1, 0.7, 0.3, 0.2][len(found) - 1]}

    batches = toy.Bags(interrupt=(signal.SIGINT, 4, 1))
    config = TrainConfig(epochs=9, monitor="hit")
    with pytest.raises(KeyboardInterrupt):
        fit(model, batches, config=config, run=Run(path=tmp_path, device="cpu"), validate=validate)
    assert all((found[1][name] == value).all() for name, value in model.state_dict().items())


def test_resuming_again_and_again(tmp_path: Path, whole: tuple[toy.Toy, Any]) -> None:
    for epochs in (2, 3, 7, 8, 8):
        model, report = toy.train(tmp_path, resume=True, epochs=epochs)
    assert toy.same(model, whole[0]) and toy.learned(report) == toy.learned(whole[1])
    assert report.stopped == "finished"


def test_patience_is_remembered(tmp_path: Path) -> None:
    def run(resume: bool, path: Path, epochs: int) -> Any:
        model = toy.Toy()
        values = iter([0.5, 0.4, 0.4, 0.4, 0.4, 0.4])
        if resume:
            values = iter([0.4] * 6)
        return fit(
            model, toy.Bags(), config=TrainConfig(epochs=epochs, patience=4, monitor="x"),
            run=Run(path=path, device="cpu", resume=resume), validate=lambda: {"x": next(values)},
        )  # fmt: skip

    run(False, tmp_path / "a", 3)
    report = run(True, tmp_path / "a", 50)
    assert (report.epochs, report.best_epoch, report.best_value, report.stopped) == (5, 1, 0.5, "patience")


def test_without_a_checkpoint_it_begins_anew(tmp_path: Path, whole: tuple[toy.Toy, Any]) -> None:
    assert toy.same(toy.train(tmp_path / "new", resume=True)[0], whole[0])


def test_a_fresh_run_does_not_leave_another_s_checkpoint(tmp_path: Path) -> None:
    toy.train(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, interrupt=(signal.SIGINT, 1, 1))
    assert not (tmp_path / "checkpoints").exists()


def test_other_settings_are_refused(tmp_path: Path) -> None:
    toy.train(tmp_path, epochs=2)
    with pytest.raises(ConfigError, match="another 'learning_rate'"):
        toy.train(tmp_path, resume=True, learning_rate=0.5)
    config = TrainConfig(epochs=2, learning_rate=0.03, monitor="hit", patience=100)
    model = toy.Toy()
    with pytest.raises(ConfigError, match="another 'seed'"):
        fit(model, toy.Bags(), config=config, run=Run(path=tmp_path, resume=True, seed=4))
    with pytest.raises(ConfigError, match="6 batches an epoch, now 4"):
        fit(model, toy.Bags(size=25), config=config, run=Run(path=tmp_path, resume=True, seed=3))
    with pytest.raises(ConfigError, match="needs the folder"):
        fit(model, toy.Bags(), config=config, run=Run(resume=True))


def test_another_model_is_refused(tmp_path: Path) -> None:
    toy.train(tmp_path, epochs=1)
    model = toy.Toy()
    model.mix = toy.nn.Linear(8, 9)
    config = TrainConfig(epochs=2, learning_rate=0.03, monitor="hit", patience=100)
    with pytest.raises(StorageError, match="does not fit this model"):
        fit(model, toy.Bags(), config=config, run=Run(path=tmp_path, resume=True, seed=3))


def _with_little_room(path: Path) -> None:
    """Resume where no file may grow to the size of the tensors: writing fails as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        toy.train(path, resume=True)
    except StorageError as error:
        os._exit(7 if "cannot be written" in str(error) and "File too large" in str(error) else 8)
    os._exit(9)


def test_no_room_for_a_checkpoint(tmp_path: Path, whole: tuple[toy.Toy, Any]) -> None:
    """The error says so, the checkpoint before it is whole, and with room again the run goes on."""
    toy.train(tmp_path, epochs=3)
    before = {file: file.read_bytes() for file in (tmp_path / "checkpoints").rglob("*.*")}
    assert in_a_child(_with_little_room, tmp_path) == 7
    assert {file: file.read_bytes() for file in (tmp_path / "checkpoints").rglob("*.*")} == before
    model, report = toy.train(tmp_path, resume=True)
    assert toy.same(model, whole[0]) and toy.learned(report) == toy.learned(whole[1])


@pytest.mark.parametrize("part", ["safetensors.torch.save_file", "json.dumps"])
def test_disk_full(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[toy.Toy, Any]) -> None:
    toy.train(tmp_path, epochs=3)
    with monkeypatch.context() as patch:
        real = {"json.dumps": checkpoints.json.dumps}.get(part)

        def full(value: Any, *args: Any, **settings: Any) -> Any:
            if real is not None and "progress" not in value:
                return real(value, *args, **settings)
            raise OSError(28, "No space left on device")

        patch.setattr(part, full)
        with pytest.raises(StorageError, match="No space left on device"):
            toy.train(tmp_path, resume=True)
    assert checkpoints.load_checkpoint(tmp_path / "checkpoints" / "last").progress["epoch"] == 3
    model, report = toy.train(tmp_path, resume=True)
    assert toy.same(model, whole[0]) and toy.learned(report) == toy.learned(whole[1])
