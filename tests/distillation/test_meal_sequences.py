"""MEAL for recommenders: an ensemble of sequential models in one, what it reads, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vouch import Catalog, Dataset, Interactions, Queries, Run, Split, load, method, split
from vouch.distillation.adversary import Judges, telling
from vouch.distillation.sequences import Teaching, Weighted, distil_recommender, taught
from vouch.distillation.taps import distances, mixture, pooled
from vouch.distillation.teachers import Depths, Together, at_positions, looks_ahead, score_items
from vouch.errors import ConfigError
from vouch.evaluation import evaluate
from vouch.nn.transformer import Context
from vouch.recommenders.sequential.batches import SequenceBatch

SMALL: dict[str, Any] = {"hidden_size": 12, "max_length": 6, "batch_size": 16, "dropout": 0.1}
CPU = Run(device="cpu")


def ring(n_users: int = 60, n_items: int = 15, seed: int = 0) -> Dataset:
    """Users who walk a ring of items step by step, now and then jumping."""
    random, user, item, time = np.random.default_rng(seed), [], [], []
    for u in range(n_users):
        at = int(random.integers(n_items))
        for step in range(8):
            user, item, time = [*user, u], [*item, at], [*time, step]
            at = int(random.integers(n_items)) if random.random() < 0.1 else (at + 1) % n_items
    log = Interactions.from_arrays(user, item, time=time)
    return Dataset(log, Catalog.empty(log.items), None, "ring")


@pytest.fixture(scope="module")
def made() -> Split:
    return split(ring())


@pytest.fixture(scope="module")
def teachers(made: Split) -> list[Any]:
    found = []
    for seed, (slug, settings) in enumerate(
        [("sasrec", {"num_layers": 2}), ("gru4rec", {"recurrent_size": 20, "hidden_size": 16})]
    ):
        model = method(slug)(epochs=12, learning_rate=0.01, **{**SMALL, **settings})
        model.fit(made, Run(seed=seed, device="cpu"))
        found.append(model)
    return found


def student(slug: str = "gru4rec", **settings: Any) -> Any:
    settings = {f"meal.{name}" if name in ours else name: value for name, value in settings.items()}
    return method(slug)(**{**SMALL, "objective": ("next", "meal"), "epochs": 2, **settings})


ours = ("teacher", "weight", "similarity", "taps", "gamma", "items", "adversary", "eta", "ramp", "teachers", "length")


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def first_batch(model: Any, made: Split, objective: Any) -> SequenceBatch:
    return next(model.batches(made.train, objective.draws()).epoch(np.random.default_rng(0), 0, 1))


# The loss, by hand --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["random", "mean"])
def test_similarity_by_hand(made: Split, teachers: list[Any], which: str) -> None:
    model = student(teacher=which, adversary="none", gamma=0.5, weight=2.0, dropout=0.0)
    with taught(model, teachers, made, 0.25):
        objective = model.begin(made)
        batch = first_batch(model, made, objective)
        found = objective.loss(batch)
    chosen, items = batch.extra["meal"]
    assert items is None
    asked = range(2) if which == "mean" else [chosen]
    total = 0.0
    for row, length in enumerate(batch.lengths.tolist()):
        history = batch.items[row : row + 1, :length]
        with torch.no_grad():
            hidden = model.network(history, torch.tensor([length]), Context())[0]
            theirs = [teachers[k].network(history, torch.tensor([length]), Context())[0] for k in asked]
        for t in range(length):
            scores = hidden[t] @ model.network.item_vectors().T
            chance = [
                (h[t] @ teachers[k].network.item_vectors().T).softmax(-1) for k, h in zip(asked, theirs, strict=True)
            ]
            target = torch.stack(chance).mean(0)
            tap = torch.stack([pooled(h[t : t + 1], 12)[0] for h in theirs]).mean(0).softmax(-1)
            near = (target * scores.log_softmax(-1)).sum() + 0.5 * (tap * hidden[t].log_softmax(-1)).sum()
            total -= near.item()
    n = int(batch.lengths.sum())
    assert float(found["similarity"].detach()) == pytest.approx(0.75 * 2.0 * total / n, rel=1e-4)
    with taught(model, teachers, made, 1.0):
        pure = model.begin(made)
        pure.encoder.load_state_dict(objective.encoder.state_dict())
        alone = pure.loss(batch)
    assert float(found["next"].detach()) == pytest.approx(0.25 * float(alone["next"].detach()))
    assert float(alone["similarity"].detach()) == 0


def test_discriminators_read_the_last_positions_and_turn_the_gradient(made: Split, teachers: list[Any]) -> None:
    gradients = {}
    for adversary in ("none", "grl", "cooperative"):
        model = student(adversary=adversary, eta=0.3, ramp=0.0, dropout=0.0)
        with taught(model, teachers, made, 0.0), torch.random.fork_rng():
            torch.manual_seed(0)
            objective = model.begin(made)
            batch = first_batch(model, made, objective)
            found = objective.loss(batch)
            torch.stack(list(found.values())).sum().backward()
            gradients[adversary] = model.network.dense.weight.grad.clone()
            if adversary == "grl":
                term: Any = objective.terms["meal"]
                k, context, theirs = batch.extra["meal"][0], Context(user=batch.user), Context(user=batch.user)
                with torch.no_grad():
                    own = term.vectors(model.network, model.network(batch.items, batch.lengths, context), term.depths,
                                       context, torch.arange(batch.items.numel()), None)  # fmt: skip
                    other = teachers[k].network
                    his = term.vectors(other, other(batch.items, batch.lengths, theirs), term.their_depths[k],
                                       theirs, torch.arange(batch.items.numel()), None)  # fmt: skip
                    last = torch.arange(len(batch.items)) * batch.items.shape[1] + batch.lengths - 1
                    total = sum(
                        telling(judge(torch.cat([a[last], b[last]])), torch.arange(2 * len(last)) >= len(last))
                        for judge, a, b in zip(term.judges, own, his, strict=True)
                    )
                assert len(term.judges) == 2
                assert float(found["adversary"].detach()) == pytest.approx(float(total), rel=1e-5)
    turned, helped = gradients["grl"] - gradients["none"], gradients["cooperative"] - gradients["none"]
    torch.testing.assert_close(turned, -helped, rtol=1e-3, atol=1e-7)
    assert float(helped.abs().max()) > 1e-6


def test_the_ramp_grows_by_epochs(made: Split, teachers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    losses = Judges.losses

    def watched(self: Judges, s: Any, t: Any, weights: Any = ()) -> Any:
        seen.extend(weights)
        return losses(self, s, t, weights)

    monkeypatch.setattr(Judges, "losses", watched)
    model = student(epochs=4, ramp=0.5, eta=0.3, weight=2.0, patience=99)
    distil_recommender(model, teachers, made, CPU, label_weight=0.25)
    assert list(dict.fromkeys(seen)) == pytest.approx([0.0, -0.225, -0.45])  # 0.75 x 2 x 0.3, and half of it
    assert seen.count(seen[-1]) == len(seen) / 2


def test_a_share_of_items_where_there_are_many(made: Split, teachers: list[Any]) -> None:
    model = student(items=6, adversary="grl", dropout=0.0)
    with taught(model, teachers, made, 0.0):
        objective = model.begin(made)
        batch = first_batch(model, made, objective)
        k, items = batch.extra["meal"]
        assert len(items) <= 6 and len(torch.unique(items)) == len(items)
        assert len(objective.terms["meal"].judges) == 1  # none reads scores whose places change their meaning
        found = objective.loss(batch)
        hidden = model.network(batch.items, batch.lengths).flatten(0, 1)[batch.at]
        with torch.no_grad():
            theirs = teachers[k].network(batch.items, batch.lengths).flatten(0, 1)[batch.at]
        near = distances(
            score_items(model.network, hidden)[:, items], score_items(teachers[k].network, theirs)[:, items]
        ).mean()
        tap = distances(hidden, pooled(theirs, 12)).mean()
    assert float(found["similarity"].detach()) == pytest.approx(float((near + 0.1 * tap).detach()), rel=1e-4)


# Exact statements ---------------------------------------------------------------------------------------------------


def test_targets_are_not_read_and_teachers_stay_as_they_were(made: Split, teachers: list[Any]) -> None:
    before = [weights(teacher) for teacher in teachers]

    class Blind(type(student())):  # type: ignore[misc]
        def batches(self, log: Any, draws: Any = None) -> Any:
            found = super().batches(log, draws)
            epoch = found.epoch
            found.epoch = lambda *given: (batch._replace(target=0 * batch.target) for batch in epoch(*given))
            return found

    seeing, blind = student(), Blind(student().config)
    for model in (seeing, blind):
        distil_recommender(model, teachers, made, CPU)
    assert alike(weights(seeing), weights(blind))
    for teacher, was in zip(teachers, before, strict=True):
        assert alike(weights(teacher), was) and not teacher.network.training
        hooks = [h for m in teacher.network.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
        assert not hooks
    assert not any((*m._forward_hooks, *m._forward_pre_hooks) for m in seeing.network.modules())
    assert "begin" not in vars(seeing) and "teachers" not in vars(seeing)


def test_without_teachers_share_it_is_the_plain_method(made: Split, teachers: list[Any]) -> None:
    plain, model = student(objective=("next",)), student(adversary="none")
    plain.fit(made, CPU)
    report = distil_recommender(model, teachers, made, CPU, label_weight=1.0)
    assert report.label_weight == 1 and report.teachers == ("sasrec", "gru4rec")
    for a, b in zip(weights(plain).values(), weights(model).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_copies_of_one_teacher_are_that_teacher(made: Split, teachers: list[Any]) -> None:
    one, three = student(), student()
    distil_recommender(one, teachers[:1], made, CPU)
    distil_recommender(three, [teachers[0], copy.deepcopy(teachers[0]), copy.deepcopy(teachers[0])], made, CPU)
    assert alike(weights(one), weights(three))


@pytest.mark.parametrize("adversary", ["grl", "alternating"])
def test_a_student_of_identical_teachers_approaches_them(made: Split, teachers: list[Any], adversary: str) -> None:
    queries = made.test.queries()
    target = teachers[0].score(queries).softmax(-1)

    def away(model: Any) -> float:
        return float(
            distances(model.score(queries), target.log()).mean() - distances(target.log(), target.log()).mean()
        )

    early, late = (student("sasrec", epochs=n, adversary=adversary, learning_rate=0.01, patience=99) for n in (1, 18))
    for model in (early, late):
        distil_recommender(model, [teachers[0], copy.deepcopy(teachers[0])], made, CPU)
    assert away(late) < 0.5 * away(early)
    best = (late.score(queries).argmax(-1) == target.argmax(-1)).float().mean()
    assert float(best) > 0.7


def test_it_is_saved_and_asked_without_its_teachers(made: Split, teachers: list[Any], tmp_path: Path) -> None:
    model = student(teachers=("gone/away",))
    distil_recommender(model, teachers, made, CPU)
    model.save(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded.score(made.test.queries()), model.score(made.test.queries()))
    plain = student(objective=("next",))
    plain.fit(made, CPU)
    assert plain.state().keys() == model.state().keys()


def test_a_stopped_run_goes_on_to_the_same_student(made: Split, teachers: list[Any], tmp_path: Path) -> None:
    whole, begun, rest = student(epochs=3, ramp=0.0), student(epochs=1, ramp=0.0), student(epochs=3, ramp=0.0)
    distil_recommender(whole, teachers, made, CPU)
    distil_recommender(begun, teachers, made, Run(tmp_path, device="cpu"))
    distil_recommender(rest, teachers, made, Run(tmp_path, device="cpu", resume=True))
    assert alike(weights(whole), weights(rest))


def test_the_method_trains_its_own_teachers_or_takes_some(made: Split, teachers: list[Any], tmp_path: Path) -> None:
    model = method("meal")(**{**SMALL, "epochs": 2, "meal.teachers": "sasrec,gru4rec"})
    model.fit(made, Run(tmp_path, device="cpu"))
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir()) == ["1-sasrec", "2-gru4rec"]
    assert model.diagnostics["meal.kl"] >= 0 and 0.3 < model.diagnostics["meal.discriminator"] < 1.5
    teachers[0].save(tmp_path / "one")
    other, third = (method("meal")(**{**SMALL, "epochs": 2, "meal.teachers": str(tmp_path / "one")}) for _ in range(2))
    other.fit(made, CPU)
    third.fit(made, CPU, teachers=teachers[:1])
    assert alike(weights(other), weights(third))


def test_beside_a_methods_own_loss(made: Split, teachers: list[Any], tmp_path: Path) -> None:
    teachers[0].save(tmp_path / "one")
    model = student(teachers=(str(tmp_path / "one"),))
    report = model.fit(made, CPU)
    assert report.history[-1]["next"] > 0.5 and report.history[-1]["similarity"] > 0.5


# Pieces -------------------------------------------------------------------------------------------------------------


def test_an_ensemble_answers_with_the_mean_chance(made: Split, teachers: list[Any]) -> None:
    together, queries = Together(teachers), made.test.queries()
    mean = torch.stack([teacher.score(queries).softmax(-1) for teacher in teachers]).mean(0)
    torch.testing.assert_close(together.score(queries).softmax(-1), mean)
    assert evaluate(together, made.test, metrics=["NDCG@10"]).metrics["NDCG@10"] > 0.3
    with pytest.raises(ConfigError, match="nothing to learn"):
        together.fit(made)
    with pytest.raises(ConfigError, match="no models"):
        Together([])


def test_depths_are_the_blocks_outputs(teachers: list[Any]) -> None:
    network = teachers[0].network
    blocks = [module for module in network.modules() if type(module).__name__ == "Block"]
    seen: list[Tensor] = []
    hook = blocks[0].register_forward_hook(lambda module, given, output: seen.append(output))
    depths, context = Depths(network), Context()
    last = network(torch.tensor([[1, 2, 3]]), torch.tensor([3]), context)
    hook.remove()
    assert len(depths.blocks) == 1  # the last block's output is the network's own
    found = depths.pick(context, last, 2)
    assert torch.equal(found[0], seen[0]) and found[1] is last
    assert depths.pick(context, last, 1)[0] is last and len(depths.pick(context, last, 3)) == 3
    del depths
    assert not any(module._forward_hooks for module in network.modules())


def test_scores_of_interests_and_bias_are_those_of_the_model(made: Split, teachers: list[Any]) -> None:
    queries = Queries.from_histories([np.array([1, 2]), np.array([4])])
    for model in (*teachers, student("comirec-sa", objective=("next",))):
        if model.items is None:
            model.fit(made, CPU)
        with torch.no_grad():
            hidden = model.query_vectors(queries)
            torch.testing.assert_close(score_items(model.network, hidden), model.score(queries))
            chosen = torch.tensor([3, 7])
            torch.testing.assert_close(score_items(model.network, hidden, chosen), model.score(queries)[:, chosen])
    several = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(at_positions(several, torch.tensor([4])), several[1, 1].mean(0, keepdim=True))


def test_a_loss_of_weight_0_is_not_computed() -> None:
    class Never(torch.nn.Module):
        slug = "next"

        def forward(self, *given: Any) -> Any:
            raise AssertionError

    weighted = Weighted(Never(), 0.0)  # type: ignore[arg-type]
    found = weighted(None, torch.zeros(1), None, None)  # type: ignore[arg-type]
    assert found["next"].item() == 0


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_network_that_looks_ahead_is_found(made: Split, teachers: list[Any]) -> None:
    ahead = method("bert4rec")(**{**SMALL, "epochs": 1})
    ahead.fit(made, CPU)
    assert looks_ahead(ahead.network) and not any(looks_ahead(teacher.network) for teacher in teachers)
    with pytest.raises(ConfigError, match=r"teacher 1 \(bert4rec\) looks ahead"):
        distil_recommender(student(), [ahead], made, CPU)
    with pytest.raises(ConfigError, match="hidden items"):
        student("bert4rec")


def test_it_refuses(made: Split, teachers: list[Any]) -> None:
    other = split(ring(n_items=16))
    markov = method("markov")()
    markov.fit(made, CPU)
    cases: list[tuple[str, Any, list[Any], Split, dict[str, Any]]] = [
        ("there is no teacher", student(), [], made, {}),
        ("trained on other items", student(), teachers, other, {}),
        (r"teacher 1 \(markov\) has no output at each position", student(), [markov], made, {}),
        ("teacher 1 .* reads 6 items and the student 9", student(max_length=9), teachers, made, {}),
        ("the objective of gru4rec has no 'meal'", student(objective=("next",)), teachers, made, {}),
        ("label_weight is 2", student(), teachers, made, {"label_weight": 2}),
        ("meal has its own setting", method("meal")(**SMALL), teachers, made, {}),
    ]
    for says, model, by, data, settings in cases:
        with pytest.raises(ConfigError, match=says):
            distil_recommender(model, by, data, CPU, **settings)
    with pytest.raises(ConfigError, match="'popularity' cannot teach"):
        student(teachers=("popularity",)).fit(made, CPU)
    with pytest.raises(ConfigError, match="there is no teacher"):
        student(teachers=()).fit(made, CPU)
    with pytest.raises(ConfigError, match="has no 'meal'"):
        method("meal")(objective=("next",))


def test_mixtures_of_scores_keep_their_size() -> None:
    scores = torch.tensor([[50.0, 0.0]])
    assert torch.allclose(mixture([scores, scores]), scores, atol=1e-3)


def test_the_term_is_there() -> None:
    assert Teaching.slug == "meal"
