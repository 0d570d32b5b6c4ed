"""Atten-Mixer and SR-GNN: formulas by loops, prefixes, padding, lengths of vectors, and the read-outs' limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vouch import registry
from vouch.data import Dataset, Interactions, Queries, Split, Vocabulary, split
from vouch.errors import ConfigError
from vouch.evaluation import evaluate
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.session.attenmixer import AttenMixerRecommender
from vouch.recommenders.session.base import ByTime
from vouch.recommenders.session.readouts import AttenMixer, SoftAttention
from vouch.recommenders.session.srgnn import SRGNN, SessionGraphs, session_graphs
from vouch.training import Run

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_heads": 2,
    "levels": 3,
    "max_length": 7,
    "batch_size": 16,
    "epochs": 2,
    "dropout": 0.0,
    "loss": "ce",
}
MODELS = [
    ("attenmixer", {}),
    ("attenmixer", {"level_pool": "sum", "query_norm": "feature"}),
    ("attenmixer", {"readout": "attention"}),
    ("attenmixer", {"readout": "last"}),
    ("srgnn", {}),
    ("srgnn", {"steps": 2, "readout": "attenmixer"}),
]
ITEMS, LENGTHS = torch.tensor([[3, 6, 3, 12, 1], [9, 0, 9, -1, -1]]), torch.tensor([5, 3])


@pytest.fixture(scope="module")
def made() -> Split:
    """60 sessions of 1 to 7 clicks over 20 items, with repeats."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 8, 60)
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(60)),
        Vocabulary.of_numbers(np.arange(20)),
        np.repeat(np.arange(60), lengths),
        random.integers(0, 20, lengths.sum()).astype(np.int32),
    )
    return split(Dataset.of(log), "session")


def started(made: Split, slug: str, **settings: Any) -> Any:
    model = registry.method(slug)(**{**SMALL, **settings})
    torch.manual_seed(0)
    model.begin(made)
    with torch.no_grad():
        for value in model.network.parameters():
            value.normal_(std=0.5)
        model.network.item.weight[0].zero_()
    model.network.eval()
    return model


# The read-out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["concat", "sum"])
@pytest.mark.parametrize("norm", ["level", "feature"])
@pytest.mark.parametrize("power", [1.0, 4.0])
def test_the_readout_by_loops(pool: Any, norm: Any, power: float) -> None:
    torch.manual_seed(0)
    T, D, L, H = 4, 6, 3, 2
    made = AttenMixer(D, levels=L, num_heads=H, power=power, dropout=0.0, level_pool=pool, query_norm=norm)
    h = torch.randn(T, D)
    last = torch.zeros(1, T, L, D)
    for e in range(T):
        for back in range(L):
            if e - back >= 0:
                last[0, e, back] = h[e - back]
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    got = made(h[None, None], last, seen)[0]
    weights = made.weights(h[None, None], last, seen)[0]
    for e in range(T):
        q = []
        for n in range(1, L + 1):
            group = last[0, e, :n]
            q.append(made.level[n - 1](group.flatten() if pool == "concat" else group.sum(0)))
        Q = torch.stack(q)
        Q = Q / Q.norm(dim=0 if norm == "level" else 1, keepdim=True)
        c = []
        for head in range(H):
            part = slice(3 * head, 3 * head + 3)
            p = []
            for n in range(L):
                a = [torch.sigmoid(made.query(Q[n])[part] @ made.key(h[t])[part]).item() for t in range(e + 1)]
                total = sum(math.exp(2 * value) for value in a)
                p.append([math.exp(2 * value) / total for value in a])
            r = [sum(p[n][t] ** power for n in range(L)) ** (1 / power) for t in range(e + 1)]
            total = sum(math.exp(2 * value) for value in r)
            alpha = [math.exp(2 * value) / total for value in r]
            assert weights[e, head, : e + 1].tolist() == pytest.approx(alpha, abs=1e-5)
            assert (weights[e, head, e + 1 :] == 0).all()
            c.append(sum(alpha[t] * made.value(h[t])[part] for t in range(e + 1)))
        want = made.out(torch.cat([made.norm(torch.cat(c)), h[e]]))
        assert torch.allclose(got[e], want, atol=1e-4)


def readout(*, clicks: int = 5, **settings: Any) -> tuple[AttenMixer, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = AttenMixer(6, **{"levels": 3, "num_heads": 2, "power": 4.0, "dropout": 0.0, **settings})
    h = torch.randn(2, 1, clicks, 6)
    back = torch.arange(clicks).unsqueeze(1) - torch.arange(made.levels)
    last = h[:, 0, back.clamp(min=0)] * (back >= 0).unsqueeze(-1)
    return made, h, last, torch.ones(clicks, clicks, dtype=torch.bool).tril()


def level_shares(made: AttenMixer, h: torch.Tensor, last: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Each level's own attention `(B, E, H, L, T)`, before the levels are mixed."""
    q = made.query(made.queries(last)).unflatten(-1, (made.num_heads, -1))  # (B, E, L, H, d)
    k = made.key(h).unflatten(-1, (made.num_heads, -1)).squeeze(1)  # (B, T, H, d)
    a = 2 * torch.sigmoid(torch.einsum("belhd,bthd->behlt", q, k))
    return torch.softmax(a.masked_fill(~seen[:, None, None], -torch.inf), -1)


@pytest.mark.parametrize("power", [1.0, 64.0, 1000.0])
def test_powers_run_from_the_sum_to_the_maximum(power: float) -> None:
    made, h, last, seen = readout(power=power, clicks=40)
    p = level_shares(made, h, last, seen)
    r = p.sum(3) if power == 1 else p.amax(3)
    want = torch.softmax((2 * r).masked_fill(~seen[:, None], -torch.inf), -1)
    # the norm of three equal levels is 3 ** (1 / p) times the largest
    assert torch.allclose(made.weights(h, last, seen), want, rtol=1e-5 if power == 1 else 2 * (3 ** (1 / power) - 1))
    if power > 1:
        mixed = torch.softmax((2 * p.sum(3)).masked_fill(~seen[:, None], -torch.inf), -1)
        assert not torch.allclose(mixed[:, 3:5], want[:, 3:5], rtol=1e-2)  # the two ends are not alike


def test_gradients_stay_finite_at_every_power() -> None:
    for power in (1.0, 4.0, 64.0):
        made, h, last, seen = readout(power=power, clicks=40)
        h.requires_grad_()
        (gradient,) = torch.autograd.grad(made(h, last, seen).square().sum(), h)
        assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_one_level_is_the_same_at_every_power() -> None:
    weights = [made.weights(*rest) for made, *rest in (readout(levels=1, power=power) for power in (1.0, 4.0, 64.0))]
    assert torch.allclose(weights[0], weights[1], atol=1e-6) and torch.allclose(weights[0], weights[2], atol=1e-6)


def test_one_click_gets_all_the_attention() -> None:
    made, h, last, seen = readout()
    assert torch.allclose(made.weights(h, last, seen)[:, 0, :, 0], torch.ones(2, 2))
    c = made.norm(made.value(h[:, 0, 0]))
    want = made.out(torch.cat([c, h[:, 0, 0]], 1))
    assert torch.allclose(made(h, last, seen)[:, 0], want, atol=1e-6)


@pytest.mark.parametrize("pool", ["concat", "sum"])
def test_the_order_within_a_level_matters_only_if_joined(pool: Any) -> None:
    made, _, last, _ = readout(level_pool=pool, query_norm="feature")  # a norm over levels would mix them
    one, other = made.queries(last), made.queries(last[:, :, [0, 2, 1]])  # all but the last click change places
    same = [torch.allclose(one[:, :, level], other[:, :, level], atol=1e-6) for level in range(3)]
    assert same == [True, False, pool == "sum"]  # the second level holds another click


@pytest.mark.parametrize("norm", ["level", "feature"])
def test_short_sessions_have_finite_outputs_and_gradients(norm: Any) -> None:
    made = AttenMixer(6, levels=5, num_heads=2, power=4.0, dropout=0.0, query_norm=norm)
    with torch.no_grad():
        for linear in made.level:
            linear.bias.zero_()
    seen = torch.ones(1, 1, dtype=torch.bool)
    for click in (torch.randn(6), torch.zeros(6)):  # a hidden item is a zero vector, whose queries have length 0
        h = click.view(1, 1, 1, 6).requires_grad_()
        out = made(h, torch.cat([h, torch.zeros(1, 1, 4, 6)], 2), seen)
        gradients = torch.autograd.grad(out.sum(), [h, *made.level.parameters()])
        assert torch.isfinite(out).all() and all(torch.isfinite(gradient).all() for gradient in gradients)


def test_soft_attention_by_hand() -> None:
    torch.manual_seed(0)
    made, h = SoftAttention(6), torch.randn(4, 6)
    seen = torch.ones(4, 4, dtype=torch.bool).tril()
    got = made(h[None, None], h[None, :, None], seen)[0]
    for e in range(4):
        mixed = sum(
            (made.weight.weight[0] @ torch.sigmoid(made.last(h[e]) + made.item(h[j]))) * h[j] for j in range(e + 1)
        )
        assert torch.allclose(got[e], made.out(torch.cat([h[e], mixed])), atol=1e-5)


def test_all_parameters_start_uniform(made: Split) -> None:
    for slug in ("attenmixer", "srgnn"):
        network = registry.method(slug)(**{**SMALL, "hidden_size": 64}).encoder(500, {})
        assert (network.item.weight[0] == 0).all()
        for parameter in network.parameters():
            values = parameter[1:] if parameter is network.item.weight else parameter
            assert values.abs().max() <= 1 / 8 and values.std() > 0.05


def test_heads_must_divide_the_size() -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        AttenMixer(6, levels=2, num_heads=4, power=4.0, dropout=0.0)


# The graph ----------------------------------------------------------------------------------------------------


def shares(graphs: SessionGraphs, b: int, e: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one prefix, on places: `[to, from]` shares of the nodes before each, `[from, to]` of those after each."""
    A = np.zeros((5, 5))
    place = {int(graphs.node[b, e, j]): int(graphs.first[graphs.node[b, e, j]]) % 5 for j in range(e + 1)}
    for source, target in zip(graphs.source.tolist(), graphs.target.tolist(), strict=True):
        if source in place:
            A[place[source], place[target]] += 1
    return (A / np.maximum(A.sum(0, keepdims=True), 1)).T, A / np.maximum(A.sum(1, keepdims=True), 1)


def test_session_graphs_by_loops() -> None:
    graphs = session_graphs((ITEMS + 1).clamp(min=0))
    nodes, edges = 0, 0
    for b, n in enumerate(LENGTHS.tolist()):
        session = ITEMS[b, :n].tolist()
        for e in range(n):
            first = graphs.first[graphs.node[b, e, : e + 1]]
            assert first.tolist() == [5 * b + session.index(item) for item in session[: e + 1]]
            A = np.zeros((5, 5))
            for i in range(e):
                A[session.index(session[i]), session.index(session[i + 1])] = 1
            incoming, outgoing = shares(graphs, b, e)
            assert np.allclose(outgoing, A / np.maximum(A.sum(1, keepdims=True), 1))
            assert np.allclose(incoming, (A / np.maximum(A.sum(0, keepdims=True), 1)).T)
            nodes, edges = nodes + len(set(session[: e + 1])), edges + int(A.sum())
            assert (graphs.node[b, e, e + 1 :] == len(graphs.first)).all()
        assert (graphs.node[b, n:] == len(graphs.first)).all()
    assert len(graphs.first) == nodes and len(graphs.source) == len(graphs.target) == edges


def test_nodes_that_are_alike_have_the_same_edges() -> None:
    graphs = session_graphs((ITEMS + 1).clamp(min=0))
    P = len(graphs.first)
    edges = torch.zeros(2, P, 10)  # by place: of the node an edge comes from, and of the one it goes to
    edges[0, graphs.target, graphs.first[graphs.source]] = 1
    edges[1, graphs.source, graphs.first[graphs.target]] = 1
    assert torch.equal(edges[:, graphs.alike], edges) and torch.equal(graphs.first[graphs.alike], graphs.first)
    assert torch.equal(graphs.alike[graphs.alike], graphs.alike) and len(graphs.alike.unique()) < P


def test_sessions_of_one_click_have_no_edges() -> None:
    graphs = session_graphs(torch.tensor([[4], [2]]))
    assert graphs.first.tolist() == [0, 1] and len(graphs.source) == 0 and graphs.node.flatten().tolist() == [0, 1]


def test_propagation_by_loops(made: Split) -> None:
    network = started(made, "srgnn").network
    x = F.normalize(torch.randn(1, 5, 8), dim=-1)
    context = Context()
    context.rows = (ITEMS[:1] + 1).clamp(min=0)
    got = network.see(x, context)
    graphs = session_graphs(context.rows)
    for e in range(5):
        incoming, outgoing = shares(graphs, 0, e)
        for j in range(e + 1):
            u = int(graphs.first[graphs.node[0, e, j]])
            before = sum(incoming[u, v] * network.before(x[0, v]) for v in range(5))
            after = sum(outgoing[u, v] * network.after(x[0, v]) for v in range(5))
            new = network.cell(torch.cat([before, after])[None].float(), x[0, u][None])[0]
            assert torch.allclose(got[0, e, j], F.normalize(new, dim=0), atol=1e-5)


# As recommenders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slug", "settings"), MODELS)
def test_each_prefix_is_read_as_it_would_be_alone(made: Split, slug: str, settings: Any) -> None:
    network = started(made, slug, **settings).network
    whole = network(ITEMS, LENGTHS)
    for b, n in enumerate(LENGTHS.tolist()):
        for t in range(1, n + 1):
            alone = network(ITEMS[b : b + 1, :t], torch.tensor([t]))[0, t - 1]
            assert torch.allclose(alone, whole[b, t - 1], atol=1e-5)


@pytest.mark.parametrize(("slug", "settings"), MODELS)
def test_training_on_prefixes_at_once_is_training_on_them_apart(made: Split, slug: str, settings: Any) -> None:
    network = started(made, slug, **settings).network
    target = torch.tensor([6, 3, 12, 1, 7])
    parameters = list(network.parameters())

    def loss(together: bool) -> torch.Tensor:
        table = network.item_vectors()
        if together:
            return F.cross_entropy(network(ITEMS[:1], LENGTHS[:1])[0] @ table.T, target)
        outputs = [network(ITEMS[:1, : t + 1], torch.tensor([t + 1]))[0, t] for t in range(5)]
        return torch.stack(
            [F.cross_entropy((z @ table.T)[None], target[t : t + 1]) for t, z in enumerate(outputs)]
        ).mean()

    one, other = loss(True), loss(False)
    assert one.item() == pytest.approx(other.item(), abs=1e-4)
    gradients = [torch.autograd.grad(value, parameters, allow_unused=True) for value in (one, other)]
    for a, b in zip(*gradients, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("slug", "settings"), MODELS)
def test_vectors_have_their_lengths_and_scores_their_bound(made: Split, slug: str, settings: Any) -> None:
    model = started(made, slug, **settings)
    queries = Queries.from_histories([[1, 2, 3], [7], [4, 4, 4, 4]])
    scale = model.config.scale
    assert torch.allclose(model.item_vectors().norm(dim=1), torch.ones(20), atol=1e-5)
    assert torch.allclose(model.query_vectors(queries).norm(dim=1), torch.full((3,), scale), rtol=1e-5)
    before = model.score(queries)
    assert before.abs().max() <= scale * (1 + 1e-5)
    with torch.no_grad():
        model.network.item.weight *= 3.7
    assert torch.allclose(model.score(queries), before, atol=1e-4)


@pytest.mark.parametrize(("slug", "settings"), MODELS)
def test_a_longer_session_in_the_batch_changes_nothing(made: Split, slug: str, settings: Any) -> None:
    model = started(made, slug, **settings)
    alone = model.score(Queries.from_histories([[1, 2, 3]]))[0]
    both = model.score(Queries.from_histories([[1, 2, 3], [5, 6, 7, 8, 9, 10, 11]]))[0]
    assert torch.allclose(alone, both, atol=1e-5)


def test_dropout_changes_directions_and_is_left_out_of_ranking(made: Split) -> None:
    model = AttenMixerRecommender(**{**SMALL, "dropout": 0.5})
    model.begin(made)
    model.network.train()
    lengths = model.network.item_vectors().norm(dim=1)
    assert (lengths - 1).abs().max() > 0.01  # the item matrix has dropout in training
    queries = Queries.from_histories([[1, 2, 3]])
    assert torch.equal(model.score(queries), model.score(queries))


def test_saved_models_score_alike_and_clicks_may_come_again(made: Split, tmp_path: Path) -> None:
    for slug in ("attenmixer", "srgnn"):
        model = registry.method(slug)(**SMALL)
        report = model.fit(made, Run(device="cpu"))
        assert report.history[-1]["loss"] < report.history[0]["loss"] * 1.05
        queries = Queries.from_histories([[1, 2, 3], [7]])
        model.save(tmp_path / slug)
        assert torch.equal(load(tmp_path / slug).score(queries), model.score(queries))
        found = evaluate(model, made.test, metrics=["HR@20", "MRR@20"], exclude="none")
        assert found.metrics["HR@20"] == 1.0  # there are 20 items, and none is left out


def test_rank_metrics_equal_an_independent_count(made: Split) -> None:
    model = started(made, "attenmixer")
    found = evaluate(model, made.test, metrics=["HR@3", "MRR@3"], exclude="none")
    scores = model.score(made.test.queries())
    targets, _ = made.test.targets()
    ranks = [int((row > row[item]).sum()) + 1 for row, item in zip(scores, targets.tolist(), strict=True)]
    assert found.metrics["HR@3"] == pytest.approx(np.mean([rank <= 3 for rank in ranks]))
    assert found.metrics["MRR@3"] == pytest.approx(np.mean([1 / rank if rank <= 3 else 0 for rank in ranks]))


def test_sessions_come_oldest_first_on_request(made: Split) -> None:
    log = made.dataset.interactions
    begun = np.random.default_rng(1).permutation(log.n_users)  # not the order that they are stored in
    timed = Interactions.from_codes(log.users, log.items, log.user, log.item, columns={"time": begun[log.user]})
    for given in (log, timed):
        model = AttenMixerRecommender(**SMALL, order="time")
        model.prepare(given)
        batches = model.batches(given)
        assert isinstance(batches, ByTime)
        users = torch.cat([batch.user for batch in batches.epoch(np.random.default_rng(0), 0, 1)]).numpy()
        assert set(users.tolist()) == set(np.flatnonzero(log.lengths > 1).tolist())
        assert (np.diff(users if given is log else begun[users]) > 0).all()  # without times: as they are stored


def test_the_rate_falls_every_three_epochs_and_the_penalty_is_in_the_gradient(made: Split) -> None:
    model = SRGNN(**SMALL, weight_decay=0.5)
    factor = model.schedule(100, 10)
    assert [factor(step) for step in (0, 29, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    optimizer = model.optimizer(model.begin(made))
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults["weight_decay"] == 0.5


def test_attention_learns_what_the_last_click_hides() -> None:
    """The answer is told by the first click; the last item alone cannot know it."""
    random = np.random.default_rng(0)
    first = random.integers(0, 4, 400)
    sessions = np.stack([first, *random.integers(8, 20, (3, 400)), first + 4], 1)
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(400)),
        Vocabulary.of_numbers(np.arange(20)),
        np.repeat(np.arange(400), 5),
        sessions.ravel().astype(np.int32),
    )
    ask = split(Dataset.of(log), "session")
    shape = {**SMALL, "hidden_size": 16, "epochs": 12, "evaluate_every": 12, "learning_rate": 0.01, "rate_decay": 1.0}
    values = {}
    for name in ("attenmixer", "last"):
        model = AttenMixerRecommender(**shape, readout=name)
        model.fit(ask, Run(device="cpu"))
        final = ask.test.take(np.flatnonzero(ask.test.stop - ask.test.start == 4))
        values[name] = evaluate(model, final, metrics=["HR@1"], exclude="none").metrics["HR@1"]
    assert values["attenmixer"] > 0.8 and values["last"] < 0.6
