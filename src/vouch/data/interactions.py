"""The interaction log: immutable columns sorted by user and time, in which a history is a slice."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from vouch.data.vocabulary import Vocabulary, open_array
from vouch.errors import DataError
from vouch.files import atomic_directory, read_json, write_json

FORMAT = 1
OPTIONAL = {"time": np.int64, "value": np.float32, "scenario": np.int16, "domain": np.int16}


@dataclass(frozen=True, eq=False)
class Interactions:
    """An immutable, columnar log of who interacted with what.

    Rows are sorted by user, then time; rows of equal time (or all rows of a user, without times) keep the order they
    came in. `offsets` `(n_users + 1,)` bounds each user's rows, so `item[offsets[u]:offsets[u + 1]]` is the history
    of user `u`, as a view. Any column may be a read-only memory map.

    Attributes:
        users, items: vocabularies; codes are `0..len - 1`. A user or item of the vocabulary may have no row.
        offsets: int64 `(n_users + 1,)`.
        item: int32 `(n,)` item codes.
        time: int64 `(n,)` seconds since 1970 UTC, or None.
        value: float32 `(n,)` rating or weight, or None.
        scenario, domain: int16 `(n,)` codes into `labels["scenario"]`, `labels["domain"]`, or None.
        feedback: further signals of each row, float32 `(n,)` by name, NaN where unknown: what several objectives are
            trained on (clicked, liked, seconds watched).
        labels: names of the codes of `scenario` and `domain`.
        notes: how the log was made (source, filters, rows dropped); plain JSON.
    """

    users: Vocabulary
    items: Vocabulary
    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    time: NDArray[np.int64] | None = None
    value: NDArray[np.float32] | None = None
    scenario: NDArray[np.int16] | None = None
    domain: NDArray[np.int16] | None = None
    feedback: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    labels: Mapping[str, list[str]] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_arrays(
        cls,
        user: ArrayLike,
        item: ArrayLike,
        *,
        time: ArrayLike | None = None,
        value: ArrayLike | None = None,
        scenario: ArrayLike | None = None,
        domain: ArrayLike | None = None,
        feedback: Mapping[str, ArrayLike] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Interactions:
        """Build from columns of original ids `(n,)` in any order.

        Raises:
            DataError: the columns are empty, differ in length, or hold a value that is not a finite number.
        """
        raw_user, raw_item = np.asarray(user), np.asarray(item)
        if raw_user.ndim != 1 or raw_user.shape != raw_item.shape:
            raise DataError(f"user has shape {raw_user.shape}, item {raw_item.shape}; both must be (n,)")
        if len(raw_user) == 0:
            raise DataError("the log has no rows", hint="check the source and the filters")
        users, user_codes = _encode(raw_user)
        items, item_codes = _encode(raw_item)
        labels: dict[str, list[str]] = {}
        columns: dict[str, NDArray[Any]] = {}
        for name, raw in (("scenario", scenario), ("domain", domain)):
            if raw is not None:
                vocabulary, codes = _encode(np.asarray(raw))
                if len(vocabulary) > np.iinfo(np.int16).max:
                    raise DataError(f"{name} has {len(vocabulary):,} distinct values; at most 32,767 are kept")
                labels[name] = [str(label) for label in vocabulary.ids(np.arange(len(vocabulary)))]
                columns[name] = codes.astype(np.int16)
        for name, raw in (("time", time), ("value", value)):
            if raw is not None:
                columns[name] = _finite(name, np.asarray(raw)).astype(OPTIONAL[name])
        signals = {name: np.asarray(raw, dtype=np.float32) for name, raw in (feedback or {}).items()}
        for name, column in (*columns.items(), *signals.items()):
            if column.shape != raw_user.shape:
                raise DataError(f"{name} has shape {column.shape}, user has {raw_user.shape}")
        return cls.from_codes(
            users, items, user_codes, item_codes, columns=columns, feedback=signals, labels=labels, notes=notes
        )

    @classmethod
    def from_codes(
        cls,
        users: Vocabulary,
        items: Vocabulary,
        user: NDArray[Any],
        item: NDArray[Any],
        *,
        columns: Mapping[str, NDArray[Any]] | None = None,
        feedback: Mapping[str, NDArray[np.float32]] | None = None,
        labels: Mapping[str, list[str]] | None = None,
        notes: Mapping[str, Any] | None = None,
    ) -> Interactions:
        """Build from codes in any order; sorts by (user, time), keeping the order of ties.

        The notes say how many neighbouring rows of a user came in the other order, if any did (`rows_out_of_order`).
        """
        columns = dict(columns or {})
        keys = (user,) if columns.get("time") is None else (columns["time"], user)
        order = np.lexsort(keys)  # stable
        out_of_order = int(((order[1:] < order[:-1]) & (np.diff(user[order]) == 0)).sum())
        offsets = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(np.bincount(user, minlength=len(users)), out=offsets[1:])
        return cls(
            users,
            items,
            _frozen(offsets),
            _frozen(item[order].astype(np.int32, copy=False)),
            **{name: _frozen(column[order].astype(OPTIONAL[name], copy=False)) for name, column in columns.items()},
            feedback={name: _frozen(signal[order]) for name, signal in (feedback or {}).items()},
            labels=dict(labels or {}),
            notes={**(notes or {}), **({"rows_out_of_order": out_of_order} if out_of_order else {})},
        )

    def __len__(self) -> int:
        return len(self.item)

    def __repr__(self) -> str:
        extra = [*(name for name in OPTIONAL if getattr(self, name) is not None), *self.feedback]
        with_extra = f", with {', '.join(extra)}" if extra else ""
        return f"Interactions({len(self):,} rows, {self.n_users:,} users, {self.n_items:,} items{with_extra})"

    @property
    def n_users(self) -> int:
        """Size of the user vocabulary."""
        return len(self.users)

    @property
    def n_items(self) -> int:
        """Size of the item vocabulary."""
        return len(self.items)

    @functools.cached_property
    def user(self) -> NDArray[np.int32]:
        """int32 `(n,)` user codes, expanded from `offsets` on first use."""
        return _frozen(np.repeat(np.arange(self.n_users, dtype=np.int32), np.diff(self.offsets)))

    @functools.cached_property
    def lengths(self) -> NDArray[np.int64]:
        """int64 `(n_users,)` rows per user."""
        return _frozen(np.diff(self.offsets))

    @functools.cached_property
    def item_counts(self) -> NDArray[np.int64]:
        """int64 `(n_items,)` rows per item."""
        return _frozen(np.bincount(self.item, minlength=self.n_items))

    def history(self, user: int) -> NDArray[np.int32]:
        """The items of one user code, oldest first, as a view."""
        return self.item[self.offsets[user] : self.offsets[user + 1]]

    def where(self, keep: NDArray[np.bool_], *, notes: Mapping[str, Any] | None = None) -> Interactions:
        """The rows where `keep` `(n,)` is true, with the same vocabularies (so codes keep their meaning)."""
        offsets = np.zeros(self.n_users + 1, dtype=np.int64)
        kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
        offsets[:] = kept[self.offsets]
        columns = {name: getattr(self, name) for name in OPTIONAL}
        return Interactions(
            self.users,
            self.items,
            _frozen(offsets),
            _frozen(self.item[keep]),
            **{name: None if column is None else _frozen(column[keep]) for name, column in columns.items()},
            feedback={name: _frozen(signal[keep]) for name, signal in self.feedback.items()},
            labels=self.labels,
            notes={**_without_fingerprint(self.notes), **(notes or {})},
        )

    def compact(
        self, *, notes: Mapping[str, Any] | None = None
    ) -> tuple[Interactions, NDArray[np.int64], NDArray[np.int64]]:
        """The log with vocabularies cut to the users and items that have rows, and the old codes of those kept."""
        users, items = np.flatnonzero(self.lengths > 0), np.flatnonzero(self.item_counts > 0)
        new_code = np.full(self.n_items, -1, dtype=np.int32)
        new_code[items] = np.arange(len(items), dtype=np.int32)
        smaller = Interactions(
            self.users.take(users),
            self.items.take(items),
            _frozen(np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths[users])])),
            _frozen(new_code[self.item]),
            **{name: getattr(self, name) for name in OPTIONAL},
            feedback=self.feedback,
            labels=self.labels,
            notes={**_without_fingerprint(self.notes), **(notes or {})},
        )
        return smaller, users, items

    def to_csr(self, *, binary: bool = True) -> Any:
        """A scipy CSR matrix `(n_users, n_items)` of counts, or of ones where `binary`; duplicates are summed first."""
        import scipy.sparse

        data = np.ones(len(self), dtype=np.float32)
        indices, bounds = np.array(self.item), np.array(self.offsets)  # summing duplicates sorts in place
        matrix = scipy.sparse.csr_matrix((data, indices, bounds), shape=(self.n_users, self.n_items))
        matrix.sum_duplicates()
        if binary:
            matrix.data[:] = 1.0
        return matrix

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of every column and of the ids: equal logs have equal fingerprints. Stored with saved logs."""
        if "fingerprint" in self.notes:
            return str(self.notes["fingerprint"])
        digest = hashlib.blake2b(digest_size=8)
        columns = {name: getattr(self, name) for name in ("offsets", "item", *OPTIONAL)}
        columns |= {f"feedback {name}": signal for name, signal in self.feedback.items()}
        columns |= {f"users {name}": column for name, column in self.users.arrays().items()}
        columns |= {f"items {name}": column for name, column in self.items.arrays().items()}
        for name, column in columns.items():
            digest.update(name.encode())
            if column is not None:
                for start in range(0, len(column), 1 << 22):
                    digest.update(np.ascontiguousarray(column[start : start + (1 << 22)]).data)
        digest.update(json.dumps(dict(self.labels), sort_keys=True).encode())
        return digest.hexdigest()

    def save(self, path: Path | str) -> None:
        """Write as a folder of .npy columns, atomically. `open` maps it back without reading it."""
        with atomic_directory(path) as aside:
            self.users.save(aside / "users")
            self.items.save(aside / "items")
            np.save(aside / "offsets.npy", self.offsets)
            np.save(aside / "item.npy", self.item)
            for name in OPTIONAL:
                if getattr(self, name) is not None:
                    np.save(aside / f"{name}.npy", getattr(self, name))
            for at, signal in enumerate(self.feedback.values()):
                np.save(aside / f"feedback-{at}.npy", signal)
            notes = {**self.notes, "fingerprint": self.fingerprint}
            header = {"format": FORMAT, "labels": dict(self.labels), "feedback": list(self.feedback), "notes": notes}
            write_json(aside / "log.json", header)

    @classmethod
    def open(cls, path: Path | str) -> Interactions:
        """Open a saved log by memory map: constant time and memory, whatever its size.

        Raises:
            DataError: the folder is not a saved log, is damaged, or was written by a newer version.
        """
        path = Path(path)
        if not (path / "log.json").exists():
            raise DataError(
                f"{path.name!r} is not a prepared log", where=str(path), hint="make one with: vouch data prepare SOURCE"
            )
        header = read_header(path / "log.json", FORMAT)
        columns = {name: open_array(path / f"{name}.npy") for name in OPTIONAL if (path / f"{name}.npy").exists()}
        signals = {name: open_array(path / f"feedback-{at}.npy") for at, name in enumerate(header.get("feedback", []))}
        log = cls(
            Vocabulary.open(path / "users"),
            Vocabulary.open(path / "items"),
            open_array(path / "offsets.npy"),
            open_array(path / "item.npy"),
            **columns,
            feedback=signals,
            labels=header.get("labels", {}),
            notes=header.get("notes", {}),
        )
        fits = len(log.offsets) == log.n_users + 1 and int(log.offsets[-1]) == len(log.item)
        if not fits or any(len(column) != len(log.item) for column in (*columns.values(), *signals.values())):
            raise DataError("the log's columns do not fit together", where=str(path), hint="prepare the data again")
        return log


def read_header(path: Path, newest: int) -> dict[str, Any]:
    """The JSON header of a saved folder.

    Raises:
        DataError: it is no header, or was written by a newer version.
    """
    header = read_json(path)
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise DataError(f"{path.name!r} is no header of prepared data", where=str(path), hint="prepare the data again")
    if header["format"] > newest:
        raise DataError(
            f"the data were written in format {header['format']}; this version reads up to {newest}",
            where=str(path),
            hint="upgrade vouch, or prepare the data again",
        )
    return header


def _encode(raw: NDArray[Any]) -> tuple[Vocabulary, NDArray[np.int32]]:
    """The vocabulary of a column of ids, and the column in codes."""
    if raw.dtype.kind == "f":
        if not np.isfinite(raw).all() or (raw != np.floor(raw)).any():
            raise DataError("an id column holds NaN or a fraction", hint="ids must be whole numbers or text")
        raw = raw.astype(np.int64)
    if raw.dtype.kind in "iu" and (raw.dtype != np.uint64 or int(raw.max(initial=0)) < 1 << 63):
        return Vocabulary.encode(pl.Series(raw.astype(np.int64)))
    values = raw.tolist()
    for row, value in enumerate(values):
        if value is None or value != value or value == "":
            raise DataError(
                f"an id is {value!r}", where=f"row {row + 1}", hint="every row needs a user and an item; drop such rows"
            )
    return Vocabulary.encode(pl.Series([str(value) for value in values], dtype=pl.String))


def _finite(name: str, raw: NDArray[Any]) -> NDArray[Any]:
    if raw.dtype.kind == "M":
        if np.isnat(raw).any():
            raise DataError(f"column {name!r} holds NaT", where=f"row {int(np.isnat(raw).argmax()) + 1}")
        return raw.astype("datetime64[s]").astype(np.int64)
    if raw.dtype.kind not in "iufb":
        raise DataError(f"column {name!r} holds {raw.dtype} instead of numbers")
    bad = ~np.isfinite(raw.astype(np.float64))
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise DataError(
            f"column {name!r} holds {raw[row].item()!r}", where=f"row {row + 1}", hint="drop or mend such rows"
        )
    return raw


def _without_fingerprint(notes: Mapping[str, Any]) -> dict[str, Any]:
    """Notes for other rows: what was said of the whole log's content no longer holds."""
    return {key: value for key, value in notes.items() if key != "fingerprint"}


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array
