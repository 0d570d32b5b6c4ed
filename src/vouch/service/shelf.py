"""The catalogue as it is now: the run's, with what was changed since laid over it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from vouch.errors import UnknownIdError
from vouch.service.contract import Answers
from vouch.service.schemas import Filter, Item
from vouch.service.storage import CatalogChange

KEPT = 1 << 16
KEPT_MASKS = 16
"""Combinations of filters remembered; a mask takes a byte an item."""


class Shelf:
    """An engine's catalogue with changes laid over it; never changes itself, so that it can be swapped at any moment.

    Attributes:
        version: of the changes. changes: by item id.
    """

    def __init__(self, engine: Answers, version: int, changes: Mapping[str, CatalogChange]) -> None:
        self.engine, self.version, self.changes = engine, version, dict(changes)
        codes = engine.codes(list(self.changes))
        self._code = {item: int(code) for item, code in zip(self.changes, codes, strict=True) if code >= 0}
        self._gone = np.array([code for item, code in self._code.items() if self.changes[item].deleted], np.int64)
        self._named = {name for change in self.changes.values() for name in change.attributes}
        self._present = np.ones(engine.n_items, dtype=bool)
        self._present[self._gone] = False
        self._present.flags.writeable = False
        self.item = functools.lru_cache(maxsize=KEPT)(self._item)
        self._kept = functools.lru_cache(maxsize=KEPT_MASKS)(self._filtered)

    def with_changes(self, version: int, changed: Sequence[CatalogChange]) -> Shelf:
        """The shelf after further changes."""
        return Shelf(self.engine, version, {**self.changes, **{change.item: change for change in changed}})

    def allowed(self, filters: Sequence[Filter]) -> NDArray[np.bool_] | None:
        """bool `(n_items,)`, not to be written to: the items that are there and fulfil every filter; None if that is all of them.

        Raises:
            UnknownIdError: no item has such an attribute. ConfigError: a bound on what is no number.
        """
        if not filters:
            return self._present if len(self._gone) else None
        return self._kept(tuple(each.model_dump_json() for each in filters))

    def _filtered(self, filters: tuple[str, ...]) -> NDArray[np.bool_]:
        conditions = [Filter.model_validate_json(each) for each in filters]
        kept = self._present.copy()
        for each in conditions:
            mask = self._mask(each).copy()
            for item, code in self._code.items():
                change = self.changes[item]
                if each.attribute in change.attributes:
                    mask[code] = fits(each, change.attributes[each.attribute])
                elif each.attribute == "title" and change.title is not None:
                    mask[code] = fits(each, change.title)
            kept &= mask
        kept.flags.writeable = False
        return kept

    def _mask(self, each: Filter) -> NDArray[np.bool_]:
        try:
            return self.engine.mask([each])
        except UnknownIdError:
            if each.attribute not in self._named:
                raise
            return np.zeros(self.engine.n_items, dtype=bool)  # an attribute that only changed items have

    def knows(self, item: str) -> bool:
        """Whether the item is in the run's catalogue or was added since; deleted ones count."""
        return item in self.changes or self.engine.codes([item])[0] >= 0

    def present(self, item: str) -> bool:
        """Whether the item is known and not deleted."""
        return self.knows(item) and not (item in self.changes and self.changes[item].deleted)

    def recommendable(self, item: str) -> bool:
        """Whether the model knows the item."""
        return item in self._code or (item not in self.changes and self.engine.codes([item])[0] >= 0)

    def _item(self, item: str) -> Item:
        """What is known of an item. One that nothing is known of has its id as title."""
        known = self.engine.codes([item])[0] >= 0
        base: Mapping[str, Any] = (
            self.engine.item(item) if known else {"title": item, "attributes": {}, "picture": None}
        )
        change = self.changes.get(item)
        attributes, title = dict(base["attributes"]), base["title"]
        if change is not None:
            attributes |= change.attributes
            title = change.title if change.title is not None else title
        return Item(
            item=item,
            title=title,
            attributes={name: value for name, value in attributes.items() if value is not None},
            picture=f"/v1/pictures/{quote(item, safe='')}" if base["picture"] else None,
            deleted=change is not None and change.deleted,
            recommendable=bool(known),
        )


def fits(condition: Filter, value: Any) -> bool:
    """Whether the value of an attribute fulfils a filter; see `schemas.Filter`. Numbers compare as numbers, all else as text."""
    if value is None:
        return False
    labels = value if isinstance(value, list) else [value]
    if condition.equals is not None and not any(_same(label, condition.equals) for label in labels):
        return False
    if condition.in_ is not None and not any(_same(label, one) for label in labels for one in condition.in_):
        return False
    if condition.min is None and condition.max is None:
        return True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = condition.min, condition.max
    return (low is None or value >= low) and (high is None or value <= high)


def _same(label: Any, wanted: Any) -> bool:
    if isinstance(label, bool) or isinstance(wanted, bool):
        return label is wanted
    if isinstance(label, int | float):
        return isinstance(wanted, int | float) and float(label) == float(wanted)
    return str(label) == str(wanted)
