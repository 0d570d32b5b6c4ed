"""Filters on a log, in a fixed order: time window, minimum value, duplicates, k-core. What is dropped is counted."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vouch.config import Config, setting
from vouch.data.catalog import Catalog
from vouch.data.dataset import Dataset
from vouch.data.interactions import OPTIONAL, Interactions
from vouch.data.vocabulary import Vocabulary
from vouch.errors import ConfigError, DataError


class Filters(Config):
    """Which rows count as positive interactions. The defaults keep every row."""

    since: str | None = setting(None, "first moment kept: ISO date, ISO time (UTC) or unix seconds")
    until: str | None = setting(None, "first moment no longer kept")
    min_value: float | None = setting(None, "least value (rating) that counts as positive")
    duplicates: Literal["all", "first", "last"] = setting("all", "which rows of one user and item are kept")
    k_core_user: int = setting(0, "fewest rows a user needs; applied with k_core_item until both hold", ge=0)
    k_core_item: int = setting(0, "fewest rows an item needs", ge=0)


def apply(dataset: Dataset, filters: Filters) -> Dataset:
    """The dataset with the filters applied; vocabularies, catalogue and users shrink to what is left.

    Raises:
        DataError: a filter needs a column that the log lacks, or nothing is left (the message says which filter).
        ConfigError: a time cannot be read.
    """
    log = dataset.interactions
    dropped: dict[str, int] = {}

    def keep(log: Interactions, rows: NDArray[np.bool_], why: str) -> Interactions:
        gone = int((~rows).sum())
        if gone == len(log):
            raise DataError(f"the filter {why!r} leaves no row", hint="loosen it")
        if gone:
            dropped[why] = dropped.get(why, 0) + gone
            log = log.where(rows)
        return log

    for name, sign in (("since", 1), ("until", -1)):
        moment = getattr(filters, name)
        if moment is not None:
            if log.time is None:
                raise DataError(f"the filter {name!r} needs times and the log has none", hint="leave it out")
            late = log.time >= seconds(moment, name)
            log = keep(log, late if sign > 0 else ~late, name)
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
    return _shrink(
        dataset, log, {"filters": filters.model_dump(mode="json", exclude_defaults=True), "dropped": dropped}
    )


def seconds(moment: str, name: str = "time") -> int:
    """Unix seconds of an ISO date or time (UTC unless it says otherwise), or of a plain number.

    Raises:
        ConfigError: the text is neither.
    """
    text = str(moment).strip()
    try:
        if text.lstrip("-").isdigit() and len(text) != 4:
            return int(text)
        found = datetime.fromisoformat(text if len(text) != 4 else f"{text}-01-01")
        return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp())
    except ValueError as error:
        raise ConfigError(f"{name} is {moment!r}, which is no time", hint="write 2024-01-31 or unix seconds") from error


def _firsts(log: Interactions, *, last: bool) -> NDArray[np.bool_]:
    """True at the first (or last) row of each user and item."""
    keys = log.user.astype(np.int64) * log.n_items + log.item
    keys = keys[::-1] if last else keys
    keep = np.zeros(len(keys), dtype=bool)
    keep[np.unique(keys, return_index=True)[1]] = True
    return keep[::-1] if last else keep


def _k_core(log: Interactions, per_user: int, per_item: int) -> NDArray[np.bool_]:
    """Rows of the largest part in which every user and every item has enough rows."""
    keep = np.ones(len(log), dtype=bool)
    while True:
        users = np.bincount(log.user[keep], minlength=log.n_users)
        items = np.bincount(log.item[keep], minlength=log.n_items)
        next_keep = keep & (users >= per_user)[log.user] & (items >= per_item)[log.item]
        if int(next_keep.sum()) == int(keep.sum()):
            return keep
        keep = next_keep


def _shrink(dataset: Dataset, log: Interactions, notes: dict[str, Any]) -> Dataset:
    """Drop users and items without rows from the vocabularies and tables."""
    users, items = np.flatnonzero(log.lengths > 0), np.flatnonzero(log.item_counts > 0)
    new_code = np.full(log.n_items, -1, dtype=np.int32)
    new_code[items] = np.arange(len(items), dtype=np.int32)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(log.lengths[users])])
    kept_notes = {key: value for key, value in log.notes.items() if key != "fingerprint"}
    smaller = Interactions(
        select(log.users, users),
        select(log.items, items),
        offsets,
        new_code[log.item],
        **{name: getattr(log, name) for name in OPTIONAL},
        labels=log.labels,
        notes={**kept_notes, **notes},
    )
    old = dataset.catalog
    table = old.table[items] if old.table.width else old.table
    features = {name: matrix[items] for name, matrix in old.features.items()}
    catalog = Catalog(smaller.items, table, old.roles, features, old.root)
    people = None if dataset.users is None else dataset.users[users]
    return Dataset(smaller, catalog, people, dataset.name)


def select(vocabulary: Vocabulary, codes: NDArray[np.int64]) -> Vocabulary:
    """The vocabulary of some codes, ascending."""
    ids = vocabulary.ids(codes)
    if vocabulary.is_numeric:
        return Vocabulary.of_numbers(np.array(ids, dtype=np.int64))
    return Vocabulary.of_sorted_texts([str(value) for value in ids])
