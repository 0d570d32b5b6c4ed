"""Filters on a log, in a fixed order: time window, minimum value, duplicates, k-core. What is dropped is counted."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pydantic
from numpy.typing import NDArray

from vouch.config import Config, setting
from vouch.data.catalog import Catalog
from vouch.data.dataset import Dataset
from vouch.data.interactions import Interactions
from vouch.data.times import moment
from vouch.errors import ConfigError, DataError


class Filters(Config):
    """Which rows count as positive interactions. The defaults keep every row."""

    since: int | str | None = setting(None, "first moment kept: ISO date, ISO time (UTC), year, or unix seconds")
    until: int | str | None = setting(None, "first moment no longer kept")
    min_value: float | None = setting(None, "least value (rating) that counts as positive")
    duplicates: Literal["all", "first", "last"] = setting("all", "which rows of one user and item are kept")
    k_core_user: int = setting(0, "fewest rows a user needs; applied with k_core_item until both hold", ge=0)
    k_core_item: int = setting(0, "fewest rows an item needs", ge=0)

    @pydantic.field_validator("since", "until")
    @classmethod
    def _is_a_time(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            try:
                moment(value)
            except ConfigError as error:
                raise ValueError(error.what.removeprefix("time is ")) from None
        return value


def apply(dataset: Dataset, filters: Filters) -> Dataset:
    """The dataset with the filters applied; vocabularies, catalogue and users shrink to what is left.

    The notes of the log say what was asked for (`filters`) and how many rows each filter dropped (`dropped`).

    Raises:
        DataError: a filter needs a column that the log lacks, or nothing is left (the message says which filter).
    """
    log = dataset.interactions
    dropped: dict[str, int] = {}

    def keep(log: Interactions, rows: NDArray[np.bool_], why: str) -> Interactions:
        gone = len(log) - int(np.count_nonzero(rows))
        if gone == len(log):
            raise DataError(
                f"the filter {why} = {_shown(filters, why)} leaves no row of {len(log):,}",
                hint="loosen it, or leave it out",
            )
        if gone:
            dropped[why] = gone
            log = log.where(rows)
        return log

    for name in ("since", "until"):
        bound = getattr(filters, name)
        if bound is not None:
            if log.time is None:
                raise DataError(f"the filter {name!r} needs times and the log has none", hint="leave it out")
            late = log.time >= moment(bound, name)
            log = keep(log, late if name == "since" else ~late, name)
    if filters.min_value is not None:
        if log.value is None:
            raise DataError(
                "the filter 'min_value' needs values and the log has none", hint="name the column: --columns value=NAME"
            )
        log = keep(log, log.value >= filters.min_value, "min_value")
    if filters.duplicates != "all":
        log = keep(log, _firsts(log, last=filters.duplicates == "last"), "duplicates")
    if filters.k_core_user > 1 or filters.k_core_item > 1:
        log = keep(log, _k_core(log, filters.k_core_user, filters.k_core_item), "k_core")
    if not dropped:
        return dataset
    before = dataset.interactions.notes
    totals = dict(before.get("dropped", {}))
    for why, count in dropped.items():
        totals[why] = totals.get(why, 0) + count
    chosen = {**before.get("filters", {}), **filters.model_dump(mode="json", exclude_defaults=True)}
    return _shrink(dataset, log, {"filters": chosen, "dropped": totals})


def keep_rows(dataset: Dataset, rows: NDArray[np.bool_], note: dict[str, Any]) -> Dataset:
    """The dataset with some rows of its log `(n,)` only, and without the users and items that have none left."""
    log = dataset.interactions.where(rows)
    return _shrink(dataset, log, {"cut": note})


def _shown(filters: Filters, why: str) -> str:
    if why == "k_core":
        return f"({filters.k_core_user} rows a user, {filters.k_core_item} rows an item)"
    return repr(getattr(filters, why))


def _firsts(log: Interactions, *, last: bool) -> NDArray[np.bool_]:
    """True at the first (or last) row of each user and item `(n,)`."""
    keys = log.user.astype(np.int64) * log.n_items + log.item
    keys = keys[::-1] if last else keys
    keep = np.zeros(len(keys), dtype=bool)
    keep[np.unique(keys, return_index=True)[1]] = True
    return keep[::-1] if last else keep


def _k_core(log: Interactions, per_user: int, per_item: int) -> NDArray[np.bool_]:
    """Rows `(n,)` of the largest part of the log in which every user and every item has enough rows."""
    rows = np.arange(len(log))
    user, item = log.user, log.item
    while len(rows):
        users = np.bincount(user, minlength=log.n_users)
        items = np.bincount(item, minlength=log.n_items)
        fits = (users[user] >= per_user) & (items[item] >= per_item)
        if bool(fits.all()):
            break
        rows, user, item = rows[fits], user[fits], item[fits]  # what is left shrinks, and so does each round
    keep = np.zeros(len(log), dtype=bool)
    keep[rows] = True
    return keep


def _shrink(dataset: Dataset, log: Interactions, notes: dict[str, Any]) -> Dataset:
    """Drop users and items without rows from the vocabularies and tables."""
    smaller, users, items = log.compact(notes=notes)
    old = dataset.catalog
    table = old.table[items] if old.table.width else old.table
    features = {name: matrix[items] for name, matrix in old.features.items()}
    catalog = Catalog(smaller.items, table, old.roles, features, old.root)
    people = None if dataset.users is None else dataset.users[users]
    return Dataset(smaller, catalog, people, dataset.name)
