"""The multi-task recommender: it learns what people do with items, for anyone, and ranks by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vouch import Dataset, Interactions, Queries, Query, Run, load, split
from vouch.data import Catalog
from vouch.data.readers import read
from vouch.data.world import WorldConfig, build
from vouch.errors import ConfigError, DataError, UnknownIdError
from vouch.multitask.balancers import balancers
from vouch.multitask.mtl import MTL

SMALL = {"embedding_size": 8, "bottom": (16,), "tower": (8,), "batch_size": 128, "epochs": 2}


@pytest.fixture(scope="module")
def world() -> Dataset:
    return build(WorldConfig(users=150, items=60, events=6_000, seed=1)).dataset


@pytest.fixture(scope="module")
def tastes() -> Dataset:
    """Two groups of items. People mostly see their own group's; those they click, the others they do not."""
    random = np.random.default_rng(0)
    user = np.repeat(np.arange(120), 30)
    own = random.random(len(user)) < 0.7
    item = random.integers(0, 15, len(user)) + 15 * ((user + ~own) % 2)
    click = own ^ (random.random(len(user)) < 0.05)
    stay = np.where(click, 30.0, 5.0) + random.normal(0, 1, len(user))
    log = Interactions.from_arrays(user, item, time=np.arange(len(user)), feedback={"click": click, "stay": stay})
    return Dataset(log, Catalog.empty(log.items), None, "tastes")


@pytest.fixture(scope="module")
def fitted(tastes: Dataset) -> MTL:
    model = MTL(**{**SMALL, "epochs": 8, "learning_rate": 1e-2})
    model.fit(split(tastes), Run(seed=0))
    return model


def test_tasks_are_predicted_on_rows_held_out(fitted: MTL, tastes: Dataset) -> None:
    found = fitted.measure(split(tastes).test)
    # one row a user: there is no order within a user
    assert set(found) == {"AUC click", "AUC", "RMSE stay", "R2 stay", "R2"}
    assert found["AUC click"] > 0.9
    assert found["RMSE stay"] < 8  # the spread is 11, the noise within a group 5.5


def test_a_stranger_is_served_by_history(fitted: MTL, tastes: Dataset) -> None:
    items, share = tastes.interactions.items, []
    for group in (0, 15):
        history = [items.id(items.code(group + at)) for at in range(6)]
        best = [int(items.id(code)) for code in fitted.recommend([Query(history=history)], 5).item[0]]
        share.append(np.mean([group <= item < group + 15 for item in best]))
    assert np.mean(share) >= 0.9, share


def test_the_score_is_the_weighted_mean_of_predictions(fitted: MTL, tastes: Dataset) -> None:
    queries = Queries.from_histories([np.array([1, 2]), np.array([20])], user=np.array([3, -1]))
    n = fitted.n_items
    scores = fitted.score(queries)
    for row in range(2):
        predicted = fitted.predict(_same(queries, row, n), np.arange(n))
        unit = torch.sigmoid((predicted[:, 1] - fitted.learner.mean[1]) / fitted.learner.spread[1])
        assert torch.allclose(scores[row], (predicted[:, 0] + unit) / 2, atol=1e-5)


def _same(queries: Queries, row: int, n: int) -> Queries:
    return Queries.from_histories([queries.history(row)] * n, user=np.repeat(queries.user[row], n))


def test_a_weight_of_zero_takes_a_task_out_of_the_ranking(fitted: MTL, tastes: Dataset) -> None:
    queries = Queries.from_histories([np.array([1, 2])])
    model = MTL(**{**SMALL, "weights": (0.0, 2.0)})
    model.fit(split(tastes), Run(seed=0))
    both = model.predict(_same(queries, 0, model.n_items), np.arange(model.n_items))
    assert model.score(queries)[0].argsort().tolist() == both[:, 1].argsort().tolist()
    assert fitted.tasks == ("click", "stay")


@pytest.mark.parametrize("balancer", [*balancers(), "adatask"])
def test_every_balancer_trains_it(world: Dataset, balancer: str) -> None:
    model = MTL(**{**SMALL, "balancer": balancer, "tasks": ("click", "like", "watch_time"), "epochs": 3})
    report = model.fit(split(world), Run(seed=0))
    found = model.measure(split(world).valid)
    assert {"AUC click", "AUC like", "RMSE watch_time"} <= set(found)
    losses = [row["loss"] for row in report.history]
    assert losses[-1] < losses[0]


def test_settings_of_the_balancer_reach_it(world: Dataset) -> None:
    config = MTL.Config.parse(["balancer=gradcraft", "gradcraft.tau=0.7", "epochs=1"])
    assert config.value("gradcraft.tau") == 0.7 and config.value("cagrad.c") is None
    assert config.updated({"epochs": 2}).balancing == {"tau": 0.7}
    model = MTL(**{**SMALL, "balancer": "gradcraft", "gradcraft.tau": 0.7, "epochs": 1})
    model.fit(split(world), Run(seed=0))
    assert model.told["balancer"].config.tau == 0.7


def test_settings_that_no_balancer_takes_are_refused() -> None:
    with pytest.raises(ConfigError, match="settings for 'cagrad', but the balancer is 'gradcraft'"):
        MTL(balancer="gradcraft", **{"cagrad.c": 0.3})
    with pytest.raises(ConfigError, match="'tau'"):
        MTL(balancer="gradcraft", **{"gradcraft.tau": 3})
    with pytest.raises(ConfigError, match="no setting 'tua'"):
        MTL(balancer="gradcraft", **{"gradcraft.tua": 0.3})
    with pytest.raises(ConfigError, match="adatask has no settings here"):
        MTL(balancer="adatask", **{"adatask.tau": 0.3})
    with pytest.raises(UnknownIdError, match="no balancer 'gradkraft'"):
        MTL(balancer="gradkraft", **{"gradkraft.tau": 0.3})


@pytest.mark.parametrize("balancer", ["uw", "dwa", "gradnorm", "gradvac", "gradcraft", "adatask"])
def test_resumed_is_as_if_never_stopped(world: Dataset, balancer: str, tmp_path) -> None:
    settings = {**SMALL, "balancer": balancer, "patience": 9}
    whole = MTL(**{**settings, "epochs": 4})
    whole.fit(split(world), Run(path=tmp_path / "whole", seed=0))
    MTL(**{**settings, "epochs": 2}).fit(split(world), Run(path=tmp_path / "stopped", seed=0))
    again = MTL(**{**settings, "epochs": 4})
    again.fit(split(world), Run(path=tmp_path / "stopped", seed=0, resume=True))
    one, other = whole.state(), again.state()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("architecture", ["shared-bottom", "mmoe", "ple"])
def test_saved_and_loaded_it_scores_the_same(world: Dataset, architecture: str, tmp_path) -> None:
    model = MTL(**{**SMALL, "architecture": architecture, "interaction": True, "epochs": 1})
    model.fit(split(world), Run(seed=0))
    queries = Queries.from_histories([np.array([1, 2]), np.array([5])], user=np.array([0, -1]))
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(again.score(queries), model.score(queries))
    assert again.measure(split(world).valid) == model.measure(split(world).valid)


def test_labels_that_are_unknown_take_no_part(tastes: Dataset) -> None:
    """Rows without a label of a task train the other; rows without any are left out."""
    log = tastes.interactions
    click, stay = log.feedback["click"].copy(), log.feedback["stay"].copy()
    random = np.random.default_rng(0)
    click[random.random(len(click)) < 0.5], stay[random.random(len(stay)) < 0.3] = np.nan, np.nan
    partly = Interactions.from_arrays(log.user, log.item, time=log.time, feedback={"click": click, "stay": stay})
    made = split(Dataset(partly, Catalog.empty(partly.items), None, "partly"))
    model = MTL(**SMALL)
    model.fit(made, Run(seed=0))
    assert np.isfinite(model.measure(made.test)["RMSE stay"])
    assert torch.isfinite(model.score(Queries.from_histories([np.array([1])]))).all()


@pytest.mark.parametrize("bad", ["yes", "inf", "1e60"])
def test_feedback_that_is_no_number_is_refused_where_it_stands(bad: str, tmp_path) -> None:
    """It is not taken for an unknown label, which an empty cell is."""
    rows = [f"u{n % 7},i{n % 5},{n},{n % 2 if n % 3 else ''}" for n in range(40)]
    rows[11] = f"u4,i1,11,{bad}"
    file = tmp_path / "log.csv"
    file.write_text("\n".join(["user,item,time,click", *rows]) + "\n")
    with pytest.raises(DataError, match=rf"click is '{bad}'(.|\n)*line 13, column 'click'"):
        read(file, columns={"feedback": "click"})
    with pytest.raises(DataError, match="'click' is named twice"):
        read(file, columns={"feedback": "click+click"})
    file.write_text(file.read_text().replace(bad, " 1 "))
    click = read(file, columns={"feedback": "click"}).interactions.feedback["click"]
    assert np.isnan(click).sum() == 14 and set(click[~np.isnan(click)]) == {0.0, 1.0}


def test_a_task_of_one_class_is_missing_from_the_mean_with_a_notice(tastes: Dataset) -> None:
    log = tastes.interactions
    feedback = {**log.feedback, "share": np.where(np.arange(len(log)) % 30 == 0, 1.0, 0.0)}  # never in a last row
    more = Interactions.from_arrays(log.user, log.item, time=log.time, feedback=feedback)
    made = split(Dataset(more, Catalog.empty(more.items), None, "more"))
    model = MTL(**{**SMALL, "tasks": ("click", "share"), "epochs": 1})
    with pytest.warns(UserWarning, match="AUC share is missing, and not in the mean: its 120 labels are all 0"):
        model.fit(made, Run(seed=0))
        found = model.measure(made.test)
    assert "AUC share" not in found and found["AUC"] == found["AUC click"]


def test_values_alone_are_watched_by_their_own_measure(tastes: Dataset) -> None:
    model = MTL(**{**SMALL, "tasks": ("stay",), "epochs": 12, "patience": 12, "learning_rate": 1e-2})
    with pytest.warns(UserWarning, match="one task"):
        report = model.fit(split(tastes), Run(seed=0))
    assert report.best_epoch >= 1 and model.measure(split(tastes).test)["R2 stay"] > 0.2


def test_what_it_cannot_train_on_is_said(world: Dataset) -> None:
    plain = Interactions.from_arrays([0, 0, 0, 1, 1, 1], [0, 1, 2, 1, 2, 0], time=range(6))
    with pytest.raises(DataError, match="no feedback"):
        MTL().fit(split(Dataset(plain, Catalog.empty(plain.items), None, "plain")))
    with pytest.raises(DataError, match="'clik'"):
        MTL(tasks=("clik",)).fit(split(world))
    with pytest.raises(DataError, match="2 weights for 3 tasks"):
        MTL(tasks=("click", "like", "watch_time"), weights=(1, 2)).fit(split(world))
    one = Interactions.from_arrays([0, 0, 0, 1, 1, 1], [0, 1, 2, 1, 2, 0], time=range(6), feedback={"click": [1] * 6})
    with pytest.raises(DataError, match="cannot tell AUC"):
        MTL(**SMALL).fit(split(Dataset(one, Catalog.empty(one.items), None, "one")))
    with pytest.raises(UnknownIdError, match="no balancer"):
        MTL(**{**SMALL, "balancer": "gradcarft"}).fit(split(world))
