"""ECL-SR: what is hidden and replaced, what the discriminator is told, where gradients go, and what weights of 0 mean."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vouch.data import Queries, Split
from vouch.errors import ConfigError
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.sequential import base
from vouch.recommenders.sequential.base import Objective
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.eclsr import (
    ECLSR,
    Equivariance,
    EquivarianceConfig,
    hide,
    invariance,
    judged,
    last_mean,
)
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.parts import Histories
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.training import Run

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "inner_size": 16,
    "max_length": 8,
    "batch_size": 16,
    "dropout": 0.0,
    "loss": "ce",
}
ALL = {"eclsr.contrast": 0.5, "eclsr.discriminate": 0.3, "eclsr.generate": 0.2}


def started(made: Split, **settings: Any) -> tuple[Any, Objective, Equivariance, SequenceBatch]:
    model = ECLSR(**{**SMALL, **ALL, **settings})
    torch.manual_seed(0)
    objective = model.begin(made)
    with torch.no_grad():
        for value in objective.parameters():
            value.normal_(std=0.3)
    batches = model.batches(made.train, objective.draws())
    batch = max(batches.epoch(np.random.default_rng(0), 0, 1), key=lambda b: b.items.shape[1])
    term = objective.terms["eclsr"]
    assert isinstance(term, Equivariance)
    return model, objective, term, batch


def histories(made: Split) -> Histories:
    log = made.train
    user = np.flatnonzero(log.lengths > 0)
    return Histories(log, user, log.offsets[user], log.offsets[user + 1], log.offsets[user + 1])


# What is hidden -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.95])
def test_sample_hides_exactly_as_many_as_asked(made: Split, share: float) -> None:
    some = histories(made)
    lengths = some.stop - some.start
    hidden = hide(some, EquivarianceConfig(masking="sample", mask_share=share), 50, np.random.default_rng(0))
    row = np.repeat(np.arange(len(lengths)), lengths)
    first = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    assert not hidden[first].any()
    counts = np.bincount(row, hidden, len(lengths))
    assert counts.tolist() == [min(math.floor(share * n + 1e-9) + 1, n - 1) for n in lengths]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_prob_hides_at_least_one_and_not_the_first(made: Split, share: float) -> None:
    some = histories(made)
    lengths = some.stop - some.start
    row = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    total = np.zeros(len(row))
    for seed in range(20):
        hidden = hide(some, EquivarianceConfig(mask_share=share), 10, np.random.default_rng(seed))
        assert not hidden[place == 0].any()
        counts = np.bincount(row, hidden, len(lengths))
        assert (counts[lengths > 1] >= 1).all() and (counts[lengths == 1] == 0).all()
        assert (counts <= int(share * 10 + 1)).all()
        if share == 0.01:  # mostly none is drawn, and then it is the last
            assert hidden[(place == lengths[row] - 1) & (lengths[row] > 1)].mean() > 0.6
        total += hidden
    if share == 0.3:
        early = (place > 0) & (place < 4) & (lengths[row] > 5)
        assert total[early].mean() / 20 == pytest.approx(0.3, abs=0.05)


# What is replaced and told ------------------------------------------------------------------------------------


def test_only_hidden_items_change_and_only_to_items(made: Split) -> None:
    _, objective, term, batch = started(made)
    objective.train()
    edited, loss = term.edit(objective.encoder, batch)
    hidden = batch.extra["eclsr"][0]
    assert torch.equal(edited[~hidden], batch.items[~hidden])
    assert (edited[hidden] >= 0).all() and (edited[hidden] < 25).all()
    assert loss is not None and torch.isfinite(loss)


def test_the_generator_is_trained_on_what_was_hidden(made: Split) -> None:
    _, objective, term, batch = started(made)
    encoder, hidden = objective.encoder, batch.extra["eclsr"][0]
    x_BTD, _ = encoder.embed(batch.items)
    out = term.generator(x_BTD, hidden, batch.lengths)
    log_p = torch.log_softmax(out @ encoder.item_vectors().T, -1)
    want = -log_p[torch.arange(len(out)), batch.items[hidden]].mean()
    edited, loss = term.edit(encoder, batch)
    assert loss is not None and loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.equal(edited[hidden], log_p.argmax(1))
    # what is hidden is not seen: another item there gives the same output
    other = torch.where(hidden, (batch.items + 1) % 25, batch.items)
    assert torch.allclose(term.generator(encoder.embed(other)[0], hidden, batch.lengths), out, atol=1e-6)


@pytest.mark.parametrize("combine", ["addall", "add", "cat", "atten"])
@pytest.mark.parametrize("share", ["all", "own"])
def test_the_discriminators_loss_by_hand(made: Split, combine: str, share: str) -> None:
    if (combine, share) == ("atten", "all"):
        with pytest.raises(ConfigError, match=r"eclsr\.share=own"):
            ECLSR(**{**SMALL, "eclsr.combine": combine})
        return
    _, objective, term, batch = started(made, **{"eclsr.combine": combine, "eclsr.share": share})
    encoder = objective.encoder
    hidden_BTD = encoder(batch.items, batch.lengths)
    edited, _ = term.edit(encoder, batch)
    got = term.discriminate(encoder, edited, hidden_BTD, batch)
    total, count = 0.0, 0
    for b, n in enumerate(batch.lengths.tolist()):
        u = hidden_BTD[b, n - 1]
        rows = encoder.item.weight[edited[b, :n] + 1]
        if combine == "addall":
            x = rows + hidden_BTD[b, :n]
        elif combine == "add":
            x = rows + u
        elif combine == "cat":
            assert term.joint is not None
            x = torch.cat([u.expand(n, -1), rows], 1) @ term.joint.weight.T
        else:
            x = torch.cat([u[None], rows])
        length = torch.tensor([len(x)])
        D = term.own(x[None], length)[0][-n:] if term.own is not None else encoder.read(x[None], length, Context())[0]
        for t in range(n):
            p = torch.sigmoid(D[t] @ term.verdict.weight[0]).item()
            y = float(edited[b, t] != batch.items[b, t])
            total -= y * math.log(p) + (1 - y) * math.log(1 - p)
            count += 1
    assert got.item() == pytest.approx(total / count, rel=1e-4)
    assert 0 < term.diagnose()["eclsr.replaced"] < 1 and 0 <= term.diagnose()["eclsr.auc"] <= 1


def test_without_the_true_history_the_discriminator_is_unconditional(made: Split) -> None:
    _, objective, term, batch = started(made)
    encoder = objective.encoder
    edited, _ = term.edit(encoder, batch)
    nothing = torch.zeros_like(encoder(batch.items, batch.lengths))
    with_zero = term.discriminate(encoder, edited, nothing, batch).item()
    term.settings = term.settings.updated({"conditional": False})
    unconditional = term.discriminate(encoder, edited, encoder(batch.items, batch.lengths), batch).item()
    assert with_zero == pytest.approx(unconditional, rel=1e-6)


# Where gradients go -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["addall", "add", "cat", "atten"])
def test_the_discriminator_trains_the_encoder_and_not_the_generator(made: Split, combine: str) -> None:
    _, objective, term, batch = started(made, **{"eclsr.combine": combine, "eclsr.share": "own"})
    encoder = objective.encoder
    edited, _ = term.edit(encoder, batch)
    hidden_BTD = encoder(batch.items, batch.lengths)
    own = list(encoder.transformer.parameters())
    loss = term.discriminate(encoder, edited, hidden_BTD, batch)
    through = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True)
    assert max(float(g.abs().max()) for g in through if g is not None) > 0
    generator = torch.autograd.grad(loss, list(term.generator.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in generator)
    apart = term.discriminate(encoder, edited, hidden_BTD.detach(), batch)
    through = torch.autograd.grad(apart, own, allow_unused=True)
    assert all(g is None or float(g.abs().max()) == 0 for g in through)


# The invariance -----------------------------------------------------------------------------------------------


def test_invariance_by_hand() -> None:
    one, two, user = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 1, 0, 2])
    total = 0.0
    for i in range(4):
        cos = [torch.cosine_similarity(one[i], two[j], dim=0).item() / 0.05 for j in range(4)]
        seen = [j for j in range(4) if j == i or user[j] != user[i]]
        total -= cos[i] - math.log(sum(math.exp(cos[j]) for j in seen))
    assert invariance(one, two, 0.05, user).item() == pytest.approx(total / 4, rel=1e-4)


def test_means_of_the_last_outputs_leave_out_padding() -> None:
    hidden = torch.arange(8.0).view(2, 4, 1)
    lengths = torch.tensor([4, 1])
    assert last_mean(hidden, lengths, 3).flatten().tolist() == [2.0, 4.0]
    assert last_mean(hidden, lengths, 10).flatten().tolist() == [1.5, 4.0]


def test_without_dropout_both_views_are_one(made: Split) -> None:
    _, objective, term, batch = started(made)
    hidden_BTD = objective.encoder(batch.items, batch.lengths)
    z = last_mean(hidden_BTD, batch.lengths, term.settings.last)
    want = 0.5 * invariance(z, z, 0.05, batch.user)
    assert objective.loss(batch)["contrast"].item() == pytest.approx(want.item(), rel=1e-5)


def test_one_history_alone_has_no_contrast_and_one_item_nothing_to_hide(made: Split) -> None:
    _, objective, _, batch = started(made)
    one = SequenceBatch(
        batch.items[:1, :1],
        torch.tensor([1]),
        torch.tensor([0]),
        batch.target[:1],
        batch.negatives,
        torch.tensor(1.0),
        batch.user[:1],
        {"eclsr": (torch.zeros(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64))},
    )
    with pytest.warns(UserWarning, match="a batch holds one history"):
        assert set(objective.loss(one)) == {"next"}


def test_more_padding_changes_no_loss(made: Split) -> None:
    _, objective, _, batch = started(made)
    rows, width = batch.items.shape
    hidden, other = batch.extra["eclsr"]
    pad = torch.zeros(rows, 2, dtype=torch.bool)
    wide = batch._replace(
        items=torch.cat([batch.items, torch.full((rows, 2), -1)], 1),
        at=batch.at + 2 * (batch.at // width),
        extra={"eclsr": (torch.cat([hidden, pad], 1), torch.cat([other, pad.long()], 1))},
    )
    a, b = objective.loss(batch), objective.loss(wide)
    assert set(a) == set(b) == {"next", "contrast", "generate", "discriminate"}
    for name in a:
        assert a[name].item() == pytest.approx(b[name].item(), rel=1e-5)


# Weights, stages, combinations --------------------------------------------------------------------------------


def test_weights_of_zero_are_sasrec_bit_for_bit(made: Split) -> None:
    shape = {**SMALL, "dropout": 0.3, "epochs": 2}
    plain = SASRec(**shape)
    none = ECLSR(**shape, **dict.fromkeys(ALL, 0.0))
    reports = [model.fit(made, Run(seed=5, device="cpu")) for model in (plain, none)]
    assert [row["loss"] for row in reports[0].history] == [row["loss"] for row in reports[1].history]
    queries = Queries.from_histories([[1, 2, 3]])
    assert torch.equal(plain.score(queries), none.score(queries))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"eclsr.discriminate": 0.0, "eclsr.generate": 0.0}, {"next", "contrast"}),
        ({"eclsr.contrast": 0.0}, {"next", "discriminate", "generate"}),
        ({"eclsr.replace_by": "random"}, {"next", "contrast", "discriminate"}),
        ({"eclsr.invariant_to": "replacement", "eclsr.discriminate": 0.0}, {"next", "contrast", "generate"}),
    ],
)
def test_each_part_can_stand_alone(made: Split, settings: dict[str, Any], names: set[str]) -> None:
    _, objective, _, batch = started(made, **settings)
    assert set(objective.loss(batch)) == names


def test_all_losses_fall_in_training(ring: Split) -> None:
    shape = {**SMALL, "max_length": 20, "epochs": 8, "learning_rate": 0.01, "dropout": 0.1}
    model = ECLSR(**shape, **ALL)
    history = model.fit(ring, Run(device="cpu")).history
    for name in ("next", "generate", "contrast"):
        assert history[-1][name] < 0.9 * history[0][name], name
    assert set(model.diagnostics) >= {"eclsr.replaced"}


def test_a_second_stage_goes_on_from_the_best_and_can_be_resumed(
    made: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {**SMALL, **ALL, "epochs": 2, "eclsr.stages": 2}
    straight = ECLSR(**shape)
    report = straight.fit(made, Run(seed=1, device="cpu", path=tmp_path / "a"))
    assert report.epochs == 4 and [row["epoch"] for row in report.history] == [1, 2, 3, 4]
    assert "discriminate" in report.history[1] and "discriminate" not in report.history[2]
    assert "contrast" in report.history[3]
    queries = Queries.from_histories([[1, 2, 3], [7]])
    straight.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), straight.score(queries))
    # stopped in either stage, and resumed
    fit = base.fit
    for stop in (1, 2):
        path, calls = tmp_path / f"stopped-{stop}", []

        def stopping(*args: Any, calls: list[int] = calls, stop: int = stop, **more: Any) -> Any:
            calls.append(1)
            return fit(*args, **{**more, "run": replace(more["run"], max_seconds=1e-9)} if len(calls) == stop else more)

        with monkeypatch.context() as patched:
            patched.setattr(base, "fit", stopping)
            stopped = ECLSR(**shape).fit(made, Run(seed=1, device="cpu", path=path))
        assert stopped.stopped == "time" and stopped.epochs == (1 if stop == 1 else 3)
        assert (path / "stage-2").exists() == (stop == 2)
        again = ECLSR(**shape)
        resumed = again.fit(made, Run(seed=1, device="cpu", path=path, resume=True))
        assert torch.equal(straight.score(queries), again.score(queries)), stop
        assert [row["loss"] for row in resumed.history] == [row["loss"] for row in report.history]


def test_the_second_stage_keeps_the_optimizer_and_has_new_patience(
    made: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    train = ECLSR.train

    def watched(self: Any, objective: Objective, split: Split, run: Run, optimizer: Any) -> Any:
        steps = [int(slots["step"]) for slots in optimizer.state.values()]
        report = train(self, objective, split, run, optimizer)
        seen.append((max(steps, default=0), report.epochs))
        return report

    monkeypatch.setattr(ECLSR, "train", watched)
    # with steps of no size nothing gets better after the first epoch: each stage waits as long as the other
    shape = {**SMALL, **ALL, "epochs": 9, "patience": 2, "learning_rate": 1e-30, "eclsr.stages": 2}
    model = ECLSR(**shape)
    report = model.fit(made, Run(seed=1, device="cpu"))
    per_epoch = len(model.batches(made.train))
    assert seen == [(0, 3), (3 * per_epoch, 3)] and report.epochs == 6


def test_areas_under_the_curve_by_counting_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 6, (40,), generator=random).float()  # with ties
    replaced = torch.rand(40, generator=random) < 0.4
    won = sum(float(bad > good) + 0.5 * float(bad == good) for bad in logits[replaced] for good in logits[~replaced])
    n = int(replaced.sum())
    assert judged(logits, replaced).tolist() == [won, n * (40 - n), n, 40]


def test_it_serves_other_encoders_and_names_what_does_not_fit(made: Split) -> None:
    model = GRU4Rec(hidden_size=16, epochs=1, objective=("next", "eclsr"))
    assert {"contrast", "discriminate", "generate"} <= set(model.fit(made, Run(device="cpu")).history[0])
    with pytest.raises(ConfigError, match="share=own"):
        SASRec(objective=("next", "eclsr"), **{"eclsr.bidirectional": True})


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_shares_lie_within_bounds(share: float) -> None:
    with pytest.raises(ConfigError, match="mask_share"):
        ECLSR(**{"eclsr.mask_share": share})


def test_there_are_two_stages_at_most() -> None:
    assert ECLSR(**{"eclsr.stages": "2"}).config.part("eclsr").stages == 2  # as the command line gives it
    with pytest.raises(ConfigError, match="stages"):
        ECLSR(**{"eclsr.stages": 3})
