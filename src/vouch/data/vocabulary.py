"""The two-way map between a log's own ids and dense integer codes."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray

from vouch.errors import DataError, UnknownIdError, did_you_mean


class Vocabulary:
    """Sorted, distinct ids; the code of an id is its rank, so codes do not depend on row order.

    Ids that are all whole numbers in their usual spelling are kept as int64 and sort by value; any others are kept
    as UTF-8 text and sort by bytes. Both open by memory map and are looked up by binary search, so a vocabulary of
    any size costs no memory to open. Build one with `Vocabulary.of`.
    """

    def __init__(
        self, numbers: NDArray[np.int64] | None, blob: NDArray[np.uint8] | None, ends: NDArray[np.int64] | None
    ):
        self._numbers, self._blob, self._ends = numbers, blob, ends

    @classmethod
    def of(cls, ids: Iterable[Any]) -> Vocabulary:
        """Build from ids in any order, duplicates allowed. Whole numbers and their spellings mean the same id."""
        values = list(ids.tolist() if isinstance(ids, np.ndarray) else ids)
        texts = {str(value) for value in values}
        if all(_is_whole(text) for text in texts):
            return cls.of_numbers(np.array(sorted(int(text) for text in texts), dtype=np.int64))
        return cls.of_sorted_texts(sorted(texts, key=lambda text: text.encode()))

    @classmethod
    def of_numbers(cls, numbers: NDArray[np.int64]) -> Vocabulary:
        """Build from strictly increasing int64 ids, without a copy."""
        if len(numbers) > 1 and not bool((numbers[1:] > numbers[:-1]).all()):
            raise DataError("vocabulary ids must be distinct and sorted", hint="use Vocabulary.of for ids in any order")
        return cls(numbers, None, None)

    @classmethod
    def of_sorted_texts(cls, texts: Sequence[str]) -> Vocabulary:
        """Build from distinct texts sorted by their UTF-8 bytes."""
        encoded = [text.encode() for text in texts]
        if any(left >= right for left, right in pairwise(encoded)):
            raise DataError("vocabulary ids must be distinct and sorted", hint="use Vocabulary.of for ids in any order")
        ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
        return cls(None, np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    @classmethod
    def encode(cls, ids: pl.Series) -> tuple[Vocabulary, NDArray[np.int32]]:
        """The vocabulary of a column of ids `(n,)` without gaps, and the column in int32 codes `(n,)`."""
        if ids.dtype.is_integer():
            return cls._encode_numbers(ids.cast(pl.Int64).to_numpy())
        # Categories number each distinct text once, so that the texts of the rows need not be held.
        drawn = ids
        if not isinstance(ids.dtype, pl.Categorical):
            drawn = ids.cast(pl.String).cast(pl.Categorical(pl.Categories.random()))
        distinct = drawn.unique()
        texts, labels = distinct.cast(pl.String), distinct.to_physical().to_numpy()
        numbers = texts.cast(pl.Int64, strict=False)
        whole = bool((numbers.cast(pl.String) == texts).fill_null(False).all())
        order = (numbers if whole else texts).arg_sort().to_numpy()  # texts sort by their UTF-8 bytes
        rank = np.zeros(int(labels.max(initial=0)) + 1, dtype=np.int32)
        rank[labels[order]] = np.arange(len(order), dtype=np.int32)
        codes = rank[drawn.to_physical().to_numpy()]
        if whole:
            return cls.of_numbers(numbers.gather(order).to_numpy()), codes
        return cls.of_sorted_texts(texts.gather(order).to_list()), codes

    @classmethod
    def _encode_numbers(cls, values: NDArray[np.int64]) -> tuple[Vocabulary, NDArray[np.int32]]:
        low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
        if high - low < 4 * len(values) + 1024:  # dense enough for a table
            seen = np.zeros(high - low + 1, dtype=bool)
            seen[values - low] = True
            rank = np.cumsum(seen, dtype=np.int32) - np.int32(1)
            return cls.of_numbers(np.flatnonzero(seen).astype(np.int64) + low), rank[values - low]
        numbers = np.unique(values)
        return cls.of_numbers(numbers), np.searchsorted(numbers, values).astype(np.int32)

    def __len__(self) -> int:
        return len(self._numbers if self._numbers is not None else self._ends)  # type: ignore[arg-type]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Vocabulary) or len(self) != len(other):
            return False
        if self._numbers is not None and other._numbers is not None:
            return bool(np.array_equal(self._numbers, other._numbers))
        if self._blob is not None and other._blob is not None:
            return np.array_equal(self._ends, other._ends) and np.array_equal(self._blob, other._blob)  # type: ignore[arg-type]
        return len(self) == 0

    def __hash__(self) -> int:
        return hash((len(self), self.id(0) if len(self) else None))

    @property
    def is_numeric(self) -> bool:
        """Whether ids are kept as whole numbers."""
        return self._numbers is not None

    def id(self, code: int) -> int | str:
        """The original id of one code."""
        if not 0 <= code < len(self):
            raise UnknownIdError(f"code {code} is outside 0..{len(self) - 1}")
        if self._numbers is not None:
            return int(self._numbers[code])
        return self._text(code).decode()

    def ids(self, codes: ArrayLike) -> list[int | str]:
        """The original ids of many codes."""
        codes = np.asarray(codes).ravel()
        if self._numbers is None:
            return [self.id(int(code)) for code in codes]
        for code in codes[(codes < 0) | (codes >= len(self))][:1]:
            self.id(int(code))  # raises
        return self._numbers[codes.astype(np.int64)].tolist()

    def take(self, codes: NDArray[Any]) -> Vocabulary:
        """The vocabulary of some codes, ascending; code `codes[i]` becomes `i`."""
        codes = np.asarray(codes, dtype=np.int64)
        if self._numbers is not None:
            return Vocabulary.of_numbers(np.asarray(self._numbers[codes]))
        assert self._blob is not None and self._ends is not None
        ends = np.asarray(self._ends)
        start = np.where(codes > 0, ends[codes - 1], 0) if len(codes) else codes
        stops = np.cumsum(ends[codes] - start, dtype=np.int64)
        lengths = np.diff(stops, prepend=0)
        bytes_ = np.arange(stops[-1] if len(stops) else 0) + np.repeat(start - (stops - lengths), lengths)
        return Vocabulary(None, self._blob[bytes_], stops)

    def get(self, value: Any) -> int:
        """The code of one id, or -1 if it is not known."""
        text = str(value)
        if self._numbers is not None:
            if not _is_whole(text):
                return -1
            number = int(text)
            rank = int(np.searchsorted(self._numbers, number))
            return rank if rank < len(self) and int(self._numbers[rank]) == number else -1
        wanted, low, high = text.encode(), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            if self._text(middle) < wanted:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self) and self._text(low) == wanted else -1

    def code(self, value: Any, *, kind: str = "id") -> int:
        """The code of one id.

        Raises:
            UnknownIdError: the id is not known; the message names near ones.
        """
        found = self.get(value)
        if found < 0:
            raise UnknownIdError(f"there is no {kind} {str(value)!r}", hint=self._suggest(str(value)))
        return found

    def codes(self, values: Iterable[Any], *, kind: str = "id") -> NDArray[np.int32]:
        """The codes of many ids; raises as `code` does, at the first unknown one."""
        return np.fromiter((self.code(value, kind=kind) for value in values), dtype=np.int32)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What the ids are kept in: `numbers` int64, or `blob` uint8 (the texts end to end) and `ends` int64."""
        if self._numbers is not None:
            return {"numbers": self._numbers}
        assert self._blob is not None and self._ends is not None
        return {"blob": self._blob, "ends": self._ends}

    def save(self, path: Path) -> None:
        """Write into the folder `path`, which is made."""
        path.mkdir(parents=True)
        for name, array in self.arrays().items():
            np.save(path / f"{name}.npy", np.asarray(array))

    @classmethod
    def open(cls, path: Path) -> Vocabulary:
        """Open a saved vocabulary by memory map."""
        if (path / "numbers.npy").exists():
            return cls(open_array(path / "numbers.npy"), None, None)
        return cls(None, open_array(path / "blob.npy"), open_array(path / "ends.npy"))

    def _text(self, code: int) -> bytes:
        assert self._blob is not None and self._ends is not None
        start = int(self._ends[code - 1]) if code else 0
        return bytes(self._blob[start : int(self._ends[code])])

    def _suggest(self, value: str) -> str:
        if len(self) <= 100_000:
            return did_you_mean(value, [str(word) for word in self.ids(np.arange(len(self)))])
        return f"{len(self)} are known, such as {', '.join(str(self.id(code)) for code in range(3))}"


@functools.lru_cache(maxsize=1 << 16)
def _is_whole(text: str) -> bool:
    """Whether text is an int64 in its one usual spelling: '7' is, '007' and '+7' and '7.0' are not."""
    digits = text[1:] if text.startswith("-") else text
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 19:
        return False
    return -(1 << 63) <= int(text) < 1 << 63 and str(int(text)) == text


def open_array(path: Path) -> NDArray[Any]:
    """Open a .npy file read-only by memory map (plainly, if it is empty: an empty file cannot be mapped).

    Raises:
        DataError: the file is missing, truncated or not an array.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path.name!r} is missing", where=str(path.parent), hint="prepare the data again") from error
    except (ValueError, EOFError, OSError) as error:
        with_empty = _load_empty(path)
        if with_empty is not None:
            return with_empty
        raise DataError(f"{path.name!r} is damaged: {error}", where=str(path), hint="prepare the data again") from error


def _load_empty(path: Path) -> NDArray[Any] | None:
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError):
        return None
    return array if array.size == 0 else None
