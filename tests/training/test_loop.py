"""The training loop against a bare one, and what stops it."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from torch import Tensor, nn

from vouch.errors import ConfigError, TrainingError
from vouch.training import Run, TrainConfig, fit, loop

CPU = Run(device="cpu", precision="32")


class Line(nn.Module):
    """One weight, and losses that a test prescribes."""

    def __init__(self, losses: list[float] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.losses, self.modes = iter(losses or []), []
        self.kinds: list[torch.dtype] = []

    def loss(self, batch: Any) -> dict[str, Tensor]:
        self.kinds.append((self.weight.view(1, 2) @ torch.ones(2, 1)).dtype)
        value = next(self.losses, 1.0)
        return {"loss": (self.weight.sum() - 2.0) + value}


class Batches:
    """`n` empty batches that note what they are given."""

    def __init__(self, n: int = 3, *, given: int | None = None) -> None:
        self.n, self.given, self.random = n, n if given is None else given, []

    def __len__(self) -> int:
        return self.n

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[Tensor]:
        self.random.append((float(generator.random()), rank, world))
        for _ in range(self.given):
            yield torch.zeros(1)


def scripted(values: list[float], **settings: Any) -> tuple[Any, list[int]]:
    """Train with prescribed validation values; the report, and the epochs that were validated."""
    asked: list[int] = []
    model = Line()
    steps = iter(range(1, 1000))

    def validate() -> dict[str, float]:
        asked.append(next(steps))
        with torch.no_grad():
            model.weight.fill_(asked[-1])  # so that the kept weights tell the validation they come from
        return {"x": values[asked[-1] - 1]}

    report = fit(model, Batches(), config=TrainConfig(monitor="x", **settings), run=CPU, validate=validate)
    return report, model.weight.detach().tolist()


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_it_is_the_plain_loop(clip: float) -> None:
    model = toy.Toy(dropout=0.0)
    config = TrainConfig(epochs=3, learning_rate=0.02, weight_decay=0.1, max_grad_norm=clip)
    report = fit(model, toy.Bags(), config=config, run=CPU)

    plain = toy.Toy(dropout=0.0)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    means = []
    for epoch in (1, 2, 3):
        found = []
        for batch in toy.Bags().epoch(np.random.default_rng([0, epoch]), 0, 1):
            total = sum(plain.loss(batch).values())
            optimizer.zero_grad()
            total.backward()  # type: ignore[union-attr]
            if clip:
                nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
            found.append(total.item())  # type: ignore[union-attr]
        means.append(np.mean(found))
    assert toy.same(model, plain)
    assert [row["loss"] for row in report.history] == pytest.approx(means, rel=1e-6)
    assert [row["epoch"] for row in report.history] == [1, 2, 3]
    assert (report.epochs, report.best_epoch, report.monitor, report.stopped) == (3, 0, None, "finished")


def test_given_optimizer_and_schedule() -> None:
    model, rates = Line(), []
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.5}])

    def schedule(step: int) -> float:
        rates.append(step)
        return 1.0 / (1 + step)

    fit(model, Batches(2), config=TrainConfig(epochs=2), run=CPU, optimizer=optimizer, schedule=schedule)
    assert rates == [0, 1, 2, 3]
    expected = 1 - 0.5 * sum(1 / (1 + step) for step in range(4))  # the gradient is 1
    assert model.weight.detach().tolist() == pytest.approx([expected] * 2)


def test_seeds_decide_and_nothing_leaks() -> None:
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first, again = toy.train()[0], toy.train()[0]
    assert toy.same(first, again)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1] and random.getstate() == before[2]
    torch.manual_seed(6)
    assert toy.same(toy.train()[0], first)
    other = toy.Toy()
    config = TrainConfig(epochs=8, learning_rate=0.03, monitor="hit", patience=100)
    fit(other, toy.Bags(), config=config, run=Run(device="cpu", seed=4), validate=other.hits)
    assert not toy.same(other, first)


def test_each_epoch_has_its_own_generator() -> None:
    batches = Batches()
    fit(Line(), batches, config=TrainConfig(epochs=3), run=Run(device="cpu", seed=7))
    assert batches.random == [(np.random.default_rng([7, epoch]).random(), 0, 1) for epoch in (1, 2, 3)]


def test_patience_counts_validations_and_the_best_weights_stay() -> None:
    report, weight = scripted([0.1, 0.3, 0.2, 0.3, 0.1, 0.9], epochs=50, patience=3)
    assert (report.epochs, report.best_epoch, report.best_value, report.stopped) == (5, 2, 0.3, "patience")
    assert weight == [2.0, 2.0]
    assert [row["x"] for row in report.history] == [0.1, 0.3, 0.2, 0.3, 0.1]


def test_validation_every_few_epochs_and_at_the_end() -> None:
    report, weight = scripted([-3.0, -2.0, -1.0], epochs=7, patience=1, evaluate_every=3)
    assert [row["epoch"] for row in report.history if "x" in row] == [3, 6, 7]
    assert (report.best_epoch, report.best_value, report.stopped) == (7, -1.0, "finished")
    assert weight == [3.0, 3.0]


def test_validation_sees_evaluation_mode_without_gradients() -> None:
    model = toy.Toy()
    seen = []

    def validate() -> dict[str, float]:
        seen.append((model.training, model.dropout.training, torch.is_grad_enabled()))
        return {"x": 1.0}

    modes = []
    hook = model.dropout.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fit(model, toy.Bags(), config=TrainConfig(epochs=2, monitor="x"), run=CPU, validate=validate)
    hook.remove()
    assert seen == [(False, False, False)] * 2 and all(modes)


def test_what_validation_must_give() -> None:
    with pytest.raises(ConfigError, match="monitor is 'NDCG@10'") as error:
        fit(Line(), Batches(), config=TrainConfig(epochs=1), run=CPU, validate=lambda: {"NDCG@5": 0.1})
    assert "NDCG@5" in str(error.value)
    with pytest.raises(TrainingError, match="x is not a number after epoch 2"):
        scripted([0.1, float("nan")], epochs=5)


def test_other_metrics_may_be_undefined(tmp_path: Path) -> None:
    _, report = toy.train(tmp_path, epochs=2)
    assert [row["empty"] for row in report.history] == [None, None]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["metrics"]["empty"] is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("flush", [1, 2, 500])
def test_a_loss_that_is_not_a_number(bad: float, flush: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "FLUSH", flush)
    model = Line([1.0, 2.0, 3.0, 4.0, bad, 6.0])
    with pytest.raises(TrainingError, match=rf"'loss' is {bad} at epoch 2, step 5"):
        fit(model, Batches(), config=TrainConfig(epochs=9), run=Run(path=tmp_path, device="cpu"))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


def test_an_exploding_gradient_is_reported_as_a_loss() -> None:
    class Exploding(Line):
        def loss(self, batch: Any) -> dict[str, Tensor]:
            return {"loss": (self.weight.sum() - 2).abs().sqrt()}  # gradient of infinity at 2, and the loss is 0

    with pytest.raises(TrainingError, match="epoch 1, step 2"):
        fit(Exploding(), Batches(), config=TrainConfig(epochs=2, max_grad_norm=1.0), run=CPU)


def test_nothing_to_train_on() -> None:
    with pytest.raises(TrainingError, match="no batch"):
        fit(Line(), Batches(0), config=TrainConfig(), run=CPU)
    with pytest.raises(TrainingError, match="epoch 1 gave no batch"):
        fit(Line(), Batches(3, given=0), config=TrainConfig(), run=CPU)


def test_time_is_up_after_an_epoch() -> None:
    report = fit(Line(), Batches(), config=TrainConfig(epochs=50), run=Run(device="cpu", max_seconds=0.0))
    assert (report.epochs, report.stopped) == (1, "time")


def test_a_step_of_its_own_logs_what_it_likes(tmp_path: Path) -> None:
    """Steps may log different names; an epoch's row has the mean of each over the steps that gave it."""
    model, calls = Line(), []

    def step(given: Any, batch: Any, optimizer: Any, fabric: Any) -> dict[str, Tensor]:
        assert given is model
        calls.append(len(calls))
        optimizer.zero_grad()
        fabric.backward(given.weight.sum())
        optimizer.step()
        value = torch.tensor(float(calls[-1]))
        return {"even": value} if calls[-1] % 2 == 0 else {"odd": value, "both": value * 10}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    report = fit(
        model, Batches(4), config=TrainConfig(epochs=2), run=Run(path=tmp_path, device="cpu"), optimizer=optimizer, step=step
    )  # fmt: skip
    rows = [{name: row[name] for name in ("even", "odd", "both")} for row in report.history]
    assert rows == [{"even": 1.0, "odd": 2.0, "both": 20.0}, {"even": 5.0, "odd": 6.0, "both": 60.0}]
    assert model.weight.detach().tolist() == pytest.approx([0.2, 0.2])
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert logged[1] == {"step": 2, "epoch": 1, "odd": 1.0, "both": 10.0}
    assert logged[4]["metrics"] == rows[0] and logged[4]["step"] == 4


def test_the_log_has_every_step(tmp_path: Path) -> None:
    _, report = toy.train(tmp_path, epochs=2)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps, epochs = [row for row in rows if "loss" in row], [row for row in rows if "metrics" in row]
    assert [(row["step"], row["epoch"]) for row in steps] == [(n, 1 + (n - 1) // 6) for n in range(1, 13)]
    assert all(row["loss"] == pytest.approx(row["entropy"] + row["penalty"]) for row in steps)
    assert [{"epoch": row["epoch"], **row["metrics"]} for row in epochs] == toy.learned(report)
    first = [row["entropy"] for row in steps[:6]]
    assert report.history[0]["entropy"] == pytest.approx(np.mean(first))


def test_bfloat16_takes_effect() -> None:
    for precision, kind in (("bf16", torch.bfloat16), ("32", torch.float32)):
        model = Line()
        fit(model, Batches(), config=TrainConfig(epochs=1), run=Run(device="cpu", precision=precision))
        assert set(model.kinds) == {kind} and model.weight.dtype == torch.float32


def test_checkpoints_are_rationed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short epochs are not all saved, but the first and the last are."""
    saved = []
    real = loop.save_checkpoint
    monkeypatch.setattr(loop, "SAVING_SHARE", 1e-9)
    monkeypatch.setattr(
        loop, "save_checkpoint", lambda *args: (saved.append((args[0].name, args[2]["epoch"])), real(*args))
    )
    _, report = toy.train(tmp_path, epochs=6)
    assert [epoch for kind, epoch in saved if kind == "last"] == [1, 6]
    assert [epoch for kind, epoch in saved if kind == "best"] == [1, report.best_epoch]


class Terminal(StringIO):
    """A place to write that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("wanted", [True, False])
def test_progress(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    model = toy.Toy()
    config = TrainConfig(epochs=3, monitor="hit")
    fit(model, toy.Bags(), config=config, run=Run(device="cpu", progress=wanted), validate=model.hits)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert ("/3" in shown and "rows/s" in shown and "best hit" in shown) if wanted else not shown


def test_progress_is_silent_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    fit(Line(), Batches(), config=TrainConfig(epochs=2), run=Run(device="cpu", progress=True))
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
