"""Small trained runs for the tests of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vouch import Catalog, Dataset, Interactions, Run, registry, split
from vouch.recommenders.runs import begin_run, finish_run

SMALL = {
    "epochs": 2, "adversarial_epochs": 2, "pretrain_epochs": 1,
    "hidden_size": 16, "max_length": 8, "negatives": 8, "recurrent_size": 8,
    "evaluate_every": 2, "batch_size": 16,
}  # fmt: skip


def small_data(root: Path | None = None, n_users: int = 60, n_items: int = 40) -> Dataset:
    """Users of two groups of items, with attributes: a brand, tags, a price with gaps, a picture."""
    random = np.random.default_rng(0)
    user, item, time = [], [], []
    half = n_items // 2
    for u in range(n_users):
        chosen = random.choice(half, size=9, replace=False) + half * (u % 2)
        chosen = np.append(chosen, chosen[0]) if u % 5 == 0 else chosen
        user += [f"u{u}"] * len(chosen)
        item += [f"i{i}" for i in chosen]
        time += list(range(100 * u, 100 * u + len(chosen)))
    signals = {name: random.random(len(item)) < 0.5 for name in ("click", "like")}
    log = Interactions.from_arrays(user, item, time=time, feedback=signals)
    number = [int(str(log.items.id(code))[1:]) for code in range(log.n_items)]
    table = pl.DataFrame(
        {
            "title": [f"Item <b>{n}</b>" for n in number],
            "brand": [f"b{n % 5}" for n in number],
            "tags": [["even" if n % 2 == 0 else "odd", "small" if n < half else "big"] for n in number],
            "price": [None if n % 7 == 0 else float(n) for n in number],
            "image": [f"{n}.png" if n % 2 else "../outside.png" for n in number],
        }
    )
    return Dataset(log, Catalog.from_frame(log.items, table.with_columns(pl.Series("id", log.items.ids(range(log.n_items)))),
                   id_column="id", root=root), None, "small")  # fmt: skip


def small_run(path: Path, slug: str = "sasrec", data: Dataset | None = None, **settings: Any) -> Path:
    """Train a method for two epochs and keep it as a run folder."""
    data = data or small_data()
    kind = registry.method(slug)
    chosen = {name: value for name, value in SMALL.items() if name in kind.Config.model_fields}
    model = kind(**{**chosen, **settings})
    made = split(data)
    begin_run(path, data, "small", keep_data=True)
    report = model.fit(made, Run(seed=3))
    finish_run(path, model, made, report, source="small", seed=3, metrics={"NDCG@10": 0.1})
    return path
