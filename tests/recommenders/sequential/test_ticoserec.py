"""TiCoSeRec: who is left alone, which item is similar, the contrast's values, and what happens without it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from vouch.data import Dataset, Interactions, Queries, Split, Vocabulary, split
from vouch.data.graphs import co_occurrence
from vouch.errors import ConfigError, DataError
from vouch.recommenders.sequential.augment import Ragged
from vouch.recommenders.sequential.contrast import Contrastive, flattened, from_graph, from_vectors, pair_contrast
from vouch.recommenders.sequential.parts import Histories, Setup
from vouch.recommenders.sequential.sasrec import SASRec
from vouch.recommenders.sequential.ticoserec import TiCoSeRec, TimeIntervals, TimeRatesConfig, unevenness
from vouch.training import Run

SMALL: dict[str, Any] = {"hidden_size": 16, "num_layers": 1, "max_length": 10, "batch_size": 16, "inner_size": 16}
DAY = 86_400


@pytest.fixture(scope="module")
def timed() -> Split:
    """40 users of 5 to 24 events over 20 items, at random times."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 25, 40)
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(40)),
        Vocabulary.of_numbers(np.arange(20)),
        np.repeat(np.arange(40), lengths),
        random.integers(0, 20, lengths.sum()).astype(np.int32),
        columns={"time": np.concatenate([np.sort(random.integers(0, 300 * DAY, n)) for n in lengths])},
    )
    return split(Dataset.of(log))


def intervals(made: Split, **settings: Any) -> TimeIntervals:
    model = SASRec(**SMALL, augment="ticoserec", **{f"ticoserec.{name}": value for name, value in settings.items()})
    model.begin(made)
    return TimeIntervals(TimeRatesConfig(**settings), Setup(model, model.network, made))


def some_histories(made: Split, users: list[int], known: int = 1) -> Histories:
    log = made.train
    user = np.array(users)
    stop = log.offsets[user + 1]
    return Histories(log, user, log.offsets[user], stop - known, stop)


# Who is left alone --------------------------------------------------------------------------------------------


def test_unevenness_by_hand() -> None:
    times = [[0, 2, 4], [0, 1, 5], [0, 0, 3, 3, 4], [7]]
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(4)),
        Vocabulary.of_numbers(np.arange(5)),
        np.repeat(np.arange(4), [3, 3, 5, 1]),
        np.zeros(12, dtype=np.int32),
        columns={"time": np.array([t * DAY for each in times for t in each])},
    )
    assert unevenness(log).tolist() == pytest.approx([0.0, 2.25, 1.0, 0.0])  # the third: gaps 3 and 1, once each
    assert unevenness(log, "cv").tolist() == pytest.approx([0.0, 1.5 / 2.5, 1 / 2, 0.0])


@pytest.mark.parametrize("share", [0.0, 0.15, 0.575, 1.0])
def test_exactly_the_most_even_share_is_left_alone(timed: Split, share: float) -> None:
    made = intervals(timed, exempt=share)
    values = unevenness(timed.train)
    expected = sorted(range(40), key=lambda u: (values[u], u))[: math.floor(share * 40 + 1e-9)]
    assert sorted(np.flatnonzero(made.exempt)) == sorted(expected)
    if not 0 < share < 1:
        return
    exempt, others = np.flatnonzero(made.exempt), np.flatnonzero(~made.exempt)
    histories = some_histories(timed, [*exempt[:5], *others[:5]])
    items, bounds = made.view(histories, 0)
    rows, own = histories.rows()
    whole = timed.train.item[rows]
    for row in range(5):
        assert items[bounds[row] : bounds[row + 1]].tolist() == whole[own[row] : own[row + 1]][-10:].tolist()


def test_among_equally_even_users_the_first_are_left_alone() -> None:
    """Gaps of one day for all but two users, who come first."""
    gaps = np.ones((10, 6))
    gaps[:2, 2] = 50.0
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(10)),
        Vocabulary.of_numbers(np.arange(7)),
        np.repeat(np.arange(10), 7),
        np.tile(np.arange(7), 10).astype(np.int32),
        columns={"time": (np.cumsum(np.column_stack([np.zeros(10), gaps]), 1) * DAY).astype(np.int64).ravel()},
    )
    made = intervals(split(Dataset.of(log)), exempt=0.35)
    assert np.flatnonzero(made.exempt).tolist() == [2, 3, 4]


def test_a_view_does_not_depend_on_the_batch(timed: Split) -> None:
    made = intervals(timed, exempt=0.0, short=5)
    users = list(range(40))

    def views(order: list[int], seed: int) -> dict[int, list[int]]:
        items, bounds = made.view(some_histories(timed, order), seed)
        return {user: items[bounds[row] : bounds[row + 1]].tolist() for row, user in enumerate(order)}

    whole = views(users, 1)
    assert views(users[::-1], 1) == whole
    assert {**views(users[:7], 1), **views(users[7:], 1)} == whole
    other = views(users, 2)
    assert sum(whole[user] != other[user] for user in users) > 30


def test_batches_of_any_size_have_the_same_views(timed: Split) -> None:
    model = TiCoSeRec(**SMALL, **{"contrastive.warmup_epochs": 0})
    objective = model.begin(timed)
    found: list[dict[int, list[list[int]]]] = []
    for size in (4, 16):
        batches = model.__class__(**{**SMALL, "batch_size": size}, every_window=False)
        batches.prepare(timed.train)
        of: dict[int, list[list[int]]] = {}
        for batch in batches.batches(timed.train, objective.draws()).epoch(np.random.default_rng([7, 1]), 0, 1):
            items, lengths = batch.extra["contrastive"]
            own = [row[:n].tolist() for row, n in zip(items, lengths.tolist(), strict=True)]
            of.update({u: own[b :: len(batch.user)] for b, u in enumerate(batch.user.tolist())})
        found.append(of)
    assert found[0] == found[1] and len(found[0]) == 40
    assert sum(one != two for one, two in found[0].values()) > 10  # the two views of a history are not one


def test_short_histories_are_neither_cropped_nor_shuffled(timed: Split) -> None:
    made = intervals(timed, short=12, exempt=0.0)
    histories = some_histories(timed, list(range(40)))
    rows, bounds = histories.rows()
    items, no_gaps, first = timed.train.item[rows].astype(np.int64), np.zeros(len(rows)), np.arange(40, dtype=np.uint64)
    picked = [made.pick(Ragged(items, bounds, no_gaps, first + np.uint64(40 * k)), histories) for k in range(30)]
    lengths, chosen = histories.stop - histories.start, np.stack(picked)
    assert set(chosen[:, lengths <= 12].ravel()) == {0, 1, 2}
    assert set(chosen[:, lengths > 12].ravel()) == {0, 1, 2, 3, 4}


def test_gaps_reach_to_the_target(timed: Split) -> None:
    made = intervals(timed)
    histories = some_histories(timed, [0, 1])
    rows, bounds = histories.rows()
    gaps = made.gaps(histories, rows, bounds)
    time = timed.train.time
    assert time is not None
    for row in (0, 1):
        a, b = histories.start[row], histories.known[row]
        assert gaps[bounds[row] : bounds[row + 1]].tolist() == pytest.approx((np.diff(time[a:b]) / DAY).tolist())


def test_a_log_without_times_is_told_what_to_do(made: Split) -> None:
    with pytest.raises(DataError, match="no 'time' column") as caught:
        TiCoSeRec(**SMALL).begin(made)
    assert "coserec" in str(caught.value.hint)


# Which item is similar ----------------------------------------------------------------------------------------


def test_memory_similarity_is_of_training_only_and_the_most_similar_is_the_highest(timed: Split) -> None:
    model = SASRec(**SMALL)
    model.begin(timed)
    found = from_graph(Setup(model, model.network, timed))
    histories = [set(timed.train.history(u).tolist()) for u in range(timed.train.n_users)]
    users = np.array([sum(i in h for h in histories) for i in range(20)])
    sim = np.zeros((20, 20))
    for h in histories:
        for i in h:
            for j in h - {i}:
                sim[i, j] += 1 / math.log(1 + len(h))
    sim /= np.sqrt(np.outer(users, users))
    off = sim[~np.eye(20, dtype=bool)]
    for i in range(20):
        assert sim[i, found.item[i]] == pytest.approx(sim[i].max(), rel=1e-5)
        scaled = (sim[i].max() - off.min()) / (off.max() - off.min())
        assert found.score[i] == pytest.approx(scaled, abs=1e-5)
    graph = co_occurrence(timed.train, neighbors=20).dense()
    assert np.allclose(graph, sim, atol=1e-6) and np.allclose(graph, graph.T)


def test_model_similarity_is_the_greatest_product() -> None:
    vectors = torch.randn(30, 8)
    found = from_vectors(vectors, block=7)
    products = (vectors @ vectors.T).numpy()
    off = ~np.eye(30, dtype=bool)
    low, high = products[off].min(), products[off].max()
    products[~off] = -np.inf
    assert found.item.tolist() == products.argmax(1).tolist()
    assert found.score == pytest.approx((products.max(1) - low) / (high - low), abs=1e-5)


def test_model_similarity_counts_only_after_its_epoch(timed: Split) -> None:
    made = intervals(timed, similarity="hybrid", hybrid_after=2)
    for epoch in (1, 2):
        made.begin_epoch(epoch)
        assert made.similar() is made.memory
    made.begin_epoch(3)
    assert made.similar() is not made.memory


# The contrast -------------------------------------------------------------------------------------------------


def test_contrast_of_equal_vectors_and_of_clear_pairs() -> None:
    ones = torch.ones(6, 4)
    assert pair_contrast(ones, ones, 1.0).item() == pytest.approx(math.log(2 * 6 - 1), rel=1e-6)
    apart = torch.eye(6)
    assert pair_contrast(apart, apart, 0.01).item() == pytest.approx(0.0, abs=1e-6)


def test_contrast_by_hand_leaves_out_the_same_user() -> None:
    one, two = torch.randn(3, 5), torch.randn(3, 5)
    user = torch.tensor([4, 9, 4])
    z = torch.cat([one, two]).double()
    total = 0.0
    for a in range(6):
        pair = (a + 3) % 6
        others = [c for c in range(6) if c != a and (user[c % 3] != user[a % 3] or c == pair)]
        total -= math.log(math.exp(z[a] @ z[pair] / 0.7) / sum(math.exp(z[a] @ z[c] / 0.7) for c in others))
    assert pair_contrast(one, two, 0.7, user).item() == pytest.approx(total / 6, rel=1e-5)


def test_flattened_views_meet_at_their_ends() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2) + 1
    made = flattened(hidden, torch.tensor([3, 1]))
    assert made[0].tolist() == [1, 2, 3, 4, 5, 6] and made[1].tolist() == [0, 0, 0, 0, 7, 8]


def test_padding_comes_before_short_views_as_published(timed: Split) -> None:
    hidden, before = torch.arange(12.0).view(2, 3, 2) + 1, -torch.arange(8.0).view(4, 2)
    made = flattened(hidden, torch.tensor([3, 1]), before)
    assert made[0].tolist() == [0, -1, 1, 2, 3, 4, 5, 6]
    assert made[1].tolist() == [0, -1, -2, -3, -4, -5, 7, 8]

    model = TiCoSeRec(**SMALL, dropout=0.0, **{"contrastive.warmup_epochs": 0, "contrastive.temperature": 5.0})
    torch.manual_seed(0)
    objective = model.begin(timed)
    term, encoder = objective.terms["contrastive"], objective.encoder
    assert isinstance(term, Contrastive)
    batches = model.batches(timed.train, objective.draws()).epoch(np.random.default_rng(0), 0, 1)
    batch = min((b for b in batches if len(b.user) > 1), key=lambda b: b.items.shape[1])
    items, lengths = batch.extra["contrastive"]
    assert items.shape[1] < 10
    past = encoder(torch.full((1, 10), -1), torch.tensor([10]))[0]
    rows = []
    for row, n in zip(items, lengths.tolist(), strict=True):
        rows.append(torch.cat([past[: 10 - n], encoder(row[None, :n], torch.tensor([n]))[0]]).flatten())
    one, two = torch.stack(rows).chunk(2)
    want = 0.1 * pair_contrast(one, two, 5.0, batch.user)
    assert objective.loss(batch)["contrastive"].item() == pytest.approx(want.item(), rel=1e-4)
    # more columns of padding in a batch change nothing
    wide = (torch.cat([items, torch.full((len(items), 1), -1)], 1), lengths)
    again = objective.loss(batch._replace(extra={"contrastive": wide}))["contrastive"]
    assert again.item() == pytest.approx(want.item(), rel=1e-4)


def test_the_optimizer_is_the_papers(timed: Split) -> None:
    """Adam with the decay in the gradient: a parameter whose loss is flat still moves by the learning rate."""
    model = TiCoSeRec(**SMALL, learning_rate=0.01)
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    holder = torch.nn.Module()
    holder.weight = weight
    optimizer = model.optimizer(holder)
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert weight.item() == pytest.approx(2.99, abs=1e-4)


def test_without_weight_it_is_sasrec_step_for_step(timed: Split) -> None:
    plain = SASRec(**SMALL, loss="bce", epochs=2, dropout=0.3)
    weightless = SASRec(**SMALL, loss="bce", epochs=2, dropout=0.3, augment="ticoserec", **{"contrastive.weight": 0.0})
    reports = [model.fit(timed, Run(seed=3, device="cpu")) for model in (plain, weightless)]
    assert [row["loss"] for row in reports[0].history] == [row["loss"] for row in reports[1].history]
    queries = Queries.from_histories([[1, 2, 3]])
    assert torch.equal(plain.score(queries), weightless.score(queries))


def test_the_contrast_begins_after_the_warm_up_and_views_differ_by_epoch(timed: Split) -> None:
    model = TiCoSeRec(**SMALL, epochs=3, **{"contrastive.warmup_epochs": 1})
    report = model.fit(timed, Run(device="cpu"))
    assert ["contrastive" in row for row in report.history] == [False, True, True]
    objective = model.begin(timed)
    objective.begin_epoch(2)
    views = [
        next(iter(model.batches(timed.train, objective.draws()).epoch(np.random.default_rng(seed), 0, 1))).extra
        for seed in (1, 1, 2)
    ]
    a, b, c = (view["contrastive"][0] for view in views)
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))


def test_contrast_learns(timed: Split) -> None:
    model = TiCoSeRec(**SMALL, epochs=12, learning_rate=1e-2, **{"contrastive.warmup_epochs": 0})
    history = model.fit(timed, Run(device="cpu")).history
    assert history[-1]["contrastive"] < 0.9 * history[0]["contrastive"]


def test_the_contrast_needs_views() -> None:
    with pytest.raises(ConfigError, match="set augment"):
        SASRec(objective=("next", "contrastive"))


@pytest.mark.parametrize("rate", [0.0, 1.5])
def test_rates_lie_between_nothing_and_all(rate: float) -> None:
    with pytest.raises(ConfigError, match="crop"):
        SASRec(augment="ticoserec", **{"ticoserec.crop": rate})
