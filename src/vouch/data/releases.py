"""Data sets as their publishers release them: MovieLens in its original forms, and RecBole's atomic files."""

from __future__ import annotations

import polars as pl

from vouch.data.columns import File, RawLog
from vouch.data.formats import open_table
from vouch.errors import DataError

GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
"""The flags of MovieLens 100K's `u.item`, in its order."""
Table = tuple[pl.DataFrame, str]


def read_recbole(file: File) -> RawLog:
    """An atomic `.inter` file: split by tabs, with typed headers such as `user_id:token`; nothing is quoted."""
    raw = open_table(file, "\t", header=True, quote=None, notes={"read_as": "RecBole"})
    raw.frame = raw.frame.rename({name: name.partition(":")[0] for name in raw.frame.collect_schema().names()})
    return raw


def read_recbole_table(file: File, id_column: str) -> Table:
    """An atomic `.item` or `.user` file; sequences of tokens become lists, except titles and names."""
    frame = open_table(file, "\t", header=True, quote=None, notes={}).collect(pl.all())
    chosen = []
    for name in frame.columns:
        bare, _, kind = name.partition(":")
        column = pl.col(name).alias(bare)
        if kind in ("token_seq", "float_seq") and not any(word in bare.lower() for word in ("title", "name", "text")):
            column = pl.col(name).str.split(" ").alias(bare)
        elif kind == "float":
            column = pl.col(name).cast(pl.Float64, strict=False).alias(bare)
        chosen.append(column)
    return frame.select(chosen), id_column


def read_movielens_100k(file: File) -> RawLog:
    """The original `u.data`: user, item, rating, time, split by tabs, without a header."""
    raw = open_table(file, "\t", header=False, quote=None, notes={"read_as": "MovieLens 100K"})
    return _named(raw, ("user", "item", "value", "time"), (0, 1, 2, 3))


def read_movielens_100k_items(file: File) -> Table:
    """The original `u.item`: id, title, date, ..., 19 genre flags, split by bars, in Latin-1."""
    rows = _cells(file, "|", 5 + len(GENRES))
    flags = [[name for name, flag in zip(GENRES, row[5:], strict=False) if flag == "1"] for row in rows]
    return pl.DataFrame({"item": [r[0] for r in rows], "title": [r[1] for r in rows], "genres": flags}), "item"


def read_movielens_100k_users(file: File) -> Table:
    """The original `u.user`: id, age, gender, occupation, zip code, split by bars."""
    rows = _cells(file, "|", 5)
    names = ("user", "age", "gender", "occupation", "zip_code")
    frame = pl.DataFrame(rows, schema=names, orient="row")
    return frame.with_columns(pl.col("age").cast(pl.Int64, strict=False)), "user"


def read_movielens_1m(file: File) -> RawLog:
    """The original `ratings.dat`: user::item::rating::time."""
    # Split by single colons, every second field is empty.
    raw = open_table(file, ":", header=False, quote=None, notes={"read_as": "MovieLens 1M"})
    return _named(raw, ("user", "item", "value", "time"), (0, 2, 4, 6))


def read_movielens_1m_items(file: File) -> Table:
    """The original `movies.dat`: id::title::genres, in Latin-1."""
    rows = _cells(file, "::", 3)
    data = {"item": [r[0] for r in rows], "title": [r[1] for r in rows], "genres": [r[2].split("|") for r in rows]}
    return pl.DataFrame(data), "item"


def read_movielens_1m_users(file: File) -> Table:
    """The original `users.dat`: id::gender::age::occupation::zip code."""
    names = ("user", "gender", "age", "occupation", "zip_code")
    return pl.DataFrame(_cells(file, "::", 5), schema=names, orient="row"), "user"


def read_movies_csv(file: File) -> Table:
    """`movies.csv` of the newer MovieLens releases: movieId, title, genres split by bars."""
    frame = open_table(file, ",", header=True, quote='"', notes={}).collect(pl.all())
    if "genres" in frame.columns:
        missing = pl.col("genres") == "(no genres listed)"
        genres = pl.when(missing).then(None).otherwise(pl.col("genres").str.split("|"))
        frame = frame.with_columns(genres.alias("genres"))
    return frame, "movieId"


def _named(raw: RawLog, roles: tuple[str, ...], places: tuple[int, ...]) -> RawLog:
    """The columns of a table without a header, by place."""
    names = raw.frame.collect_schema().names()
    if len(names) <= max(places):
        fields = sum(1 for place in places if place < len(names))
        raise DataError(f"a line has {fields} fields instead of {len(places)}", where=f"{raw.source}, line 1")
    raw.frame = raw.frame.select(pl.col(names[place]).alias(role) for role, place in zip(roles, places, strict=True))
    return raw


def _cells(file: File, mark: str, width: int) -> list[list[str]]:
    """The lines of a small Latin-1 table, split."""
    rows = []
    for number, line in enumerate(file.path.read_text(encoding="latin-1").split("\n"), 1):
        if line.strip():
            cells = line.removesuffix("\r").split(mark)
            if len(cells) < width:
                raise DataError(
                    f"the line has {len(cells)} fields split by {mark!r} instead of {width}",
                    where=f"{file}, line {number}",
                )
            rows.append(cells)
    return rows
