"""Recommendations for all users at once, into a file: in blocks, so that memory stays bounded whatever their number."""

from __future__ import annotations

import functools
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.data import Queries, Vocabulary
from vouch.errors import ConfigError, StorageError, UnknownIdError
from vouch.files import atomic_file
from vouch.service.engine import Engine, IndexKind

ROWS = 1 << 19
"""Rows of the result that are held at once."""
AHEAD = 32
"""Blocks given to a cluster before the first of them is written."""


@dataclass(frozen=True)
class Scored:
    """What was written: users, rows, users that popularity answered, and how long it took."""

    users: int
    rows: int
    fallback: int
    seconds: float


def score(
    run: Path,
    out: Path,
    *,
    users: Path | None = None,
    k: int = 100,
    repeat: bool = False,
    index: IndexKind = "auto",
    ray: str | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Scored:
    """Write the `k` best items of each user as Parquet: `user`, `rank` from 1, `item`, `score`, `fallback`.

    Ids have the type they have in the log; users come in the order of the log's vocabulary, or of the file. A user for
    whom fewer than `k` items may be recommended has fewer rows. The file appears when it is complete.

    Args:
        users: a file with one user id a line; all users of the run's log by default.
        repeat: whether items of a user's history may be recommended.
        ray: address of a Ray cluster to run on; its machines must see the run folder by the same path.
        tell: called with the number of users done, and of all.

    Raises:
        ConfigError: `k` is below 1, or `out` is no `.parquet`. UnknownIdError: a user is not in the log.
        StorageError: the file cannot be written. VouchError: the run cannot be opened.
    """
    if k < 1:
        raise ConfigError(f"k is {k}; it must be at least 1")
    if out.suffix != ".parquet":
        raise ConfigError(f"--out is {out.name!r}", hint="it is written as Parquet: name it something.parquet")
    engine = Engine.open(run, index=index)
    codes = np.arange(len(engine.users)) if users is None else _read_users(users, engine.users)
    size = max(1, min(4_096, ROWS // min(k, engine.n_items)))
    blocks = [codes[first : first + size] for first in range(0, len(codes), size)]
    begin, rows, fallback, done = time.perf_counter(), 0, 0, 0
    with (
        atomic_file(out) as aside,
        tempfile.TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None, prefix=f".{out.name}.") as parts,
    ):
        files = []
        for number, (block, found) in enumerate(
            zip(blocks, _ranked(engine, index, blocks, k, repeat, ray), strict=True)
        ):
            frame = _frame(engine, block, *found)
            files.append(Path(parts) / f"{number:08}.parquet")
            frame.write_parquet(files[-1])
            rows, done = rows + frame.height, done + len(block)
            fallback += int(found[2].sum())
            tell(done, len(codes))
        pl.scan_parquet(files).sink_parquet(aside, maintain_order=True)
    return Scored(len(codes), rows, fallback, time.perf_counter() - begin)


Ranked = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]


def engine_ranking(engine: Engine, users: NDArray[np.int64], k: int, repeat: bool) -> Ranked:
    """Items and scores `(B, k)` of users by code, and whether popularity answered `(B,)`."""
    queries = Queries.from_users(engine.log, users)
    width = min(k, engine.n_items)
    items = np.full((len(users), width), -1, dtype=np.int64)
    scores = np.full((len(users), width), -np.inf, dtype=np.float32)
    for first, block in engine.scoring.blocks(queries):
        none = np.zeros(0, np.int64)
        closed = [none if repeat else block.history(row).astype(np.int64) for row in range(len(block))]
        rows = slice(first, first + len(block))
        scores[rows], items[rows] = engine.search(block, width, closed, [None] * len(block))
    return items, scores, engine.scoring.nothing_known(queries)


def _ranked(
    engine: Engine, index: IndexKind, blocks: list[NDArray[np.int64]], k: int, repeat: bool, ray: str | None
) -> Iterator[Ranked]:
    """The rankings of blocks of users, in order, here or on a cluster that is given some blocks ahead."""
    if ray is None:
        for block in blocks:
            yield engine_ranking(engine, block, k, repeat)
        return
    from vouch.compare.on_ray import RayExecutor

    which = (engine.run.path.resolve(), index, engine.fingerprint)
    executor: Executor = RayExecutor(ray)
    try:
        under_way: deque[Future[Ranked]] = deque()
        for block in blocks:
            under_way.append(executor.submit(_rank_block, which, block, k, repeat))
            if len(under_way) >= AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        executor.shutdown()


def _rank_block(which: tuple[Path, IndexKind, str], block: NDArray[np.int64], k: int, repeat: bool) -> Ranked:
    return engine_ranking(_engine(*which), block, k, repeat)


@functools.lru_cache(maxsize=1)
def _engine(run: Path, index: IndexKind, fingerprint: str) -> Engine:
    """The run, opened once by each process of a cluster.

    Raises:
        StorageError: it is not the run that the others have.
    """
    engine = Engine.open(run, index=index)
    if engine.fingerprint != fingerprint:
        raise StorageError("the run was changed while it was scored, or differs between machines", where=str(run))
    return engine


def _frame(
    engine: Engine, users: NDArray[np.int64], items: NDArray[np.int64], scores: NDArray[np.float32], fallback: Any
) -> pl.DataFrame:
    kept = items >= 0
    rank = np.broadcast_to(np.arange(1, items.shape[1] + 1, dtype=np.int32), items.shape)
    count = kept.sum(1)
    return pl.DataFrame(
        {
            "user": _ids(engine.users, np.repeat(users, count)),
            "rank": rank[kept],
            "item": _ids(engine.items, items[kept]),
            "score": scores[kept],
            "fallback": np.repeat(fallback, count),
        }
    )


def _ids(vocabulary: Vocabulary, codes: NDArray[np.int64]) -> pl.Series:
    """Original ids of codes that may repeat."""
    distinct, place = np.unique(codes, return_inverse=True)
    dtype = pl.Int64 if vocabulary.is_numeric else pl.String
    return pl.Series(cast(list[Any], vocabulary.ids(distinct)), dtype=dtype).gather(place)


def _read_users(file: Path, vocabulary: Vocabulary) -> NDArray[np.int64]:
    """User codes of a file with one id a line; empty lines are left out.

    Raises:
        StorageError: the file cannot be read. UnknownIdError: an id is not known; the message names its line.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = "--users is the word all, or a file with one user id a line"
        raise StorageError(f"the users cannot be read: {error}", where=str(file), hint=hint) from error
    codes = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            code = vocabulary.get(line.strip())
            if code < 0:
                raise UnknownIdError(f"there is no user {line.strip()!r}", where=f"{file}, line {number}")
            codes.append(code)
    if not codes:
        raise ConfigError("the file names no user", where=str(file), hint="one user id a line")
    return np.array(codes, dtype=np.int64)
