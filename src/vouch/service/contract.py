"""What the rest of the service asks of an engine, so that it can be built and tested apart from any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from vouch.service.engine import Question, Reason, Recommended
    from vouch.service.schemas import Filter


class Answers(Protocol):
    """An opened run, ready to answer; immutable, so that it can be swapped for another at any moment.

    Item ids are text. Ids passed to `recommend` and `explain` in histories may be unknown: they are left out.
    None of the methods touches the database.
    """

    name: str
    fingerprint: str
    n_items: int

    def codes(self, items: Sequence[str]) -> NDArray[np.int64]:
        """int64 `(len(items),)` codes, -1 where the model does not know the item; cheap, never raises."""
        ...

    def knows_user(self, user: str) -> bool:
        """Whether the user is in the training log; cheap."""
        ...

    def history(self, user: str) -> list[str]:
        """The item ids of a user in the run's log, oldest first; empty for a user it does not know."""
        ...

    def check(self, question: Question) -> None:
        """Find what is wrong with a question before it joins others in a batch.

        Raises:
            ConfigError: a value does not fit. UnknownIdError: there is no such scenario or domain.
        """
        ...

    def recommend(self, questions: Sequence[Question]) -> list[list[Recommended]]:
        """The best items of each question, in the order of the questions."""
        ...

    def similar(self, item: str, k: int, allowed: NDArray[np.bool_] | None = None) -> list[Recommended]:
        """The items most like one.

        Raises:
            UnknownIdError: the item is not known. ConfigError: the method has no notion of similar items.
        """
        ...

    def explain_all(self, history: Sequence[str], items: Sequence[str], user: str | None, n: int) -> list[list[Reason]]:
        """For each of some items, the history items whose removal lowers its standing most, strongest first."""
        ...

    def evidence(self, history: list[str], item: str, user: str | None) -> dict[str, Any] | None:
        """What the method itself offers as evidence for the recommendation, in plain JSON, or None."""
        ...

    def mask(self, filters: Sequence[Filter]) -> NDArray[np.bool_]:
        """bool `(n_items,)`: the items whose attributes in the run's catalogue fulfil every filter.

        Raises:
            UnknownIdError: the catalogue has no such attribute.
        """
        ...

    def item(self, item: str) -> dict[str, Any]:
        """`title`, `attributes` (plain JSON) and `picture` (a path of a file, or None).

        Raises:
            UnknownIdError: the item is not known.
        """
        ...

    def card(self) -> dict[str, Any]:
        """The run card, in plain JSON."""
        ...
