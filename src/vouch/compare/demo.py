"""The demo: build the embedded world, compare methods on it, show three people what they get and why."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vouch.compare.compare import Comparison, compare
from vouch.compare.report import Person, Shown, write_report
from vouch.data import Queries
from vouch.data.world import World, WorldConfig, build
from vouch.evaluation import evaluate
from vouch.recommenders.base import Recommender
from vouch.recommenders.reasons import why
from vouch.recommenders.runs import begin_run, finish_run
from vouch.registry import method
from vouch.training import Run

METHODS = ("popularity", "itemknn", "markov", "ease", "bpr", "sasrec")
BUDGET = {
    "bpr": ("epochs=60", "patience=4", "evaluate_every=10"),
    "sasrec": ("epochs=40", "patience=3", "evaluate_every=4", "max_length=30", "num_layers=1", "hidden_size=64"),
}
"""Short trainings, so that the demo ends within three minutes on two cores."""


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo made: the world, the comparison, the people shown, where the report lies, and the best as a run."""

    world: World
    comparison: Comparison
    people: list[Person]
    report: Path
    run: Path


def demo(
    out: Path | str,
    *,
    seed: int = 0,
    seeds: int = 2,
    trials: int = 2,
    command: str = "vouch demo",
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Demo:
    """Run the whole job on the embedded world; write `report.html` and the best as the run `best` into `out`.

    Raises:
        StorageError: `out` cannot be written.
    """
    out = Path(out)
    world = build(WorldConfig(seed=seed))
    comparison = compare(
        world.dataset,
        METHODS,
        out=out,
        seeds=seeds,
        trials=trials,
        settings=BUDGET,
        command=command,
        on_progress=on_progress,
    )
    best = next(row for row in comparison.rows if row["status"] == "ok")
    kind = method(best["method"])
    model = kind(kind.Config(**best["config"]))
    made = comparison.plan.open()
    begin_run(out / "best", made.dataset, "world", keep_data=True)
    trained = model.fit(made, Run(seed=0))
    metrics = evaluate(model, made.valid, metrics=["NDCG@10", "HR@10", "MRR"], train=made.train).metrics
    finish_run(out / "best", model, made, trained, source="world", seed=0, metrics=metrics)
    people = show_people(world, model, three_users(world))
    report = write_report(comparison, out / "report.html", people=people)
    return Demo(world, comparison, people, report, out / "best")


def three_users(world: World) -> list[int]:
    """A quiet, a middling and a busy user, by code."""
    lengths = world.dataset.interactions.lengths
    order = np.argsort(lengths, kind="stable")
    return [int(order[int(share * (len(order) - 1))]) for share in (0.2, 0.6, 0.9)]


def show_people(world: World, model: Recommender, users: list[int], *, k: int = 5, shown: int = 6) -> list[Person]:
    """Each user's latest history and best items, with the history items that speak for them."""
    log, catalog = world.dataset.interactions, world.dataset.catalog
    queries = Queries.from_users(log, np.array(users))
    ranking = model.recommend(queries, k)
    people = []
    for row, user in enumerate(users):
        recent = log.history(user)[::-1][:shown]
        recommended = []
        for item in ranking.item[row]:
            reasons = why(model, queries, row, int(item), most=2)
            because = " and ".join(_short(catalog.title(reason.item)) for reason in reasons)
            recommended.append(_show(world, int(item), because))
        shops = world.dataset.users["shops"][user] if world.dataset.users is not None else ""
        where = "both shops" if shops == "both" else f"the {shops} shop"
        name = f"User {log.users.id(user)}: {int(log.lengths[user])} events in {where}"
        people.append(Person(name, [_show(world, int(item)) for item in recent], recommended))
    return people


def _show(world: World, item: int, reason: str = "") -> Shown:
    catalog = world.dataset.catalog
    row = catalog.table.row(item, named=True)
    return Shown(catalog.title(item), f"{row['brand']}, {row['price']:.2f}", picture_uri(world, item), reason)


def _short(title: str) -> str:
    return title.partition(",")[0]


def picture_uri(world: World, item: int, size: int = 96) -> str:
    """A picture as a data URI, to stand inside a page."""
    buffer = io.BytesIO()
    image: Any = world.picture(item, size)
    image.quantize(64).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
