"""A table for several tasks: categorical inputs, and a label a task, which may be unknown."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from vouch.errors import DataError


@dataclass(frozen=True, eq=False)
class TaskTable:
    """`n` rows with `F` inputs and `T` tasks.

    Attributes:
        name: of the data.
        codes: int64 `(n, F)`; 0 is a value that training did not see, or too seldom.
        fields: names of the inputs. sizes: how many codes each has.
        label: float32 `(n, T)`, NaN where unknown. tasks: their names.
        group: int64 `(n,)`, the rows' users, for AUC within users; or None.
    """

    name: str
    codes: NDArray[np.int64]
    fields: tuple[str, ...]
    sizes: tuple[int, ...]
    label: NDArray[np.float32]
    tasks: tuple[str, ...]
    group: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        inputs: Mapping[str, ArrayLike],
        labels: Mapping[str, ArrayLike],
        *,
        train: NDArray[np.bool_] | None = None,
        least: Mapping[str, int] | int = 1,
        group: ArrayLike | None = None,
        name: str = "table",
    ) -> TaskTable:
        """Code columns of any values `(n,)`.

        Args:
            train: the rows that codes are made from; all by default.
            least: rows of `train` a value needs to have a code of its own; by field, or for all.

        Raises:
            DataError: there is no row, input or task, or columns differ in length.
        """
        if not inputs or not labels:
            raise DataError("a table of tasks needs inputs and labels")
        n = len(np.asarray(next(iter(labels.values()))))
        known = np.ones(n, dtype=bool) if train is None else train
        if not known.any():
            raise DataError("there is no row to train on")
        codes, sizes = [], []
        for field, column in inputs.items():
            series = pl.Series(np.asarray(column)).cast(pl.String).fill_null("")
            if len(series) != n:
                raise DataError(f"{field} has {len(series):,} rows, the labels have {n:,}")
            enough = least if isinstance(least, int) else least.get(field, 1)
            counts = series.filter(pl.Series(known)).value_counts().filter(pl.col("count") >= enough)
            values = counts.get_column(counts.columns[0]).sort()
            place = pl.DataFrame({"value": values, "code": np.arange(1, len(values) + 1)})
            found = pl.DataFrame({"value": series}).join(place, on="value", how="left", maintain_order="left")
            codes.append(found["code"].fill_null(0).to_numpy().astype(np.int64))
            sizes.append(len(values) + 1)
        label = np.stack([np.asarray(column, dtype=np.float32) for column in labels.values()], 1)
        users = None if group is None else np.asarray(group, dtype=np.int64)
        return cls(name, np.stack(codes, 1), tuple(inputs), tuple(sizes), label, tuple(labels), users)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def fingerprint(self) -> str:
        """A hash of inputs and labels."""
        digest = hashlib.blake2b(digest_size=8)
        digest.update(np.ascontiguousarray(self.codes).data)
        digest.update(np.ascontiguousarray(self.label).data)
        digest.update("|".join((*self.fields, *self.tasks)).encode())
        return digest.hexdigest()

    @property
    def binary(self) -> tuple[bool, ...]:
        """For each task whether its labels are all 0 or 1."""
        with np.errstate(invalid="ignore"):
            return tuple(bool(np.isin(column[~np.isnan(column)], (0, 1)).all()) for column in self.label.T)

    def rows(self, index: Any) -> TaskTable:
        """Some of the rows."""
        group = None if self.group is None else self.group[index]
        return replace(self, codes=self.codes[index], label=self.label[index], group=group)

    def only(self, *tasks: str) -> TaskTable:
        """The table with some of its tasks."""
        at = [self.tasks.index(task) for task in tasks]
        return replace(self, label=self.label[:, at], tasks=tuple(tasks))

    def parts(self, shares: tuple[float, float], seed: int) -> tuple[TaskTable, TaskTable, TaskTable]:
        """Training, validation and test rows, drawn at random; `shares` are those of the first two."""
        order = np.random.default_rng(seed).permutation(len(self))
        first, second = int(shares[0] * len(self)), int((shares[0] + shares[1]) * len(self))
        train, valid, test = (np.sort(each) for each in np.split(order, [first, second]))
        return self.rows(train), self.rows(valid), self.rows(test)
