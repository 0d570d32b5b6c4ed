"""Reading logs of every usual form. What a source is, is told from its content, its name and its neighbours."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from vouch.data import formats
from vouch.data.catalog import Catalog
from vouch.data.columns import RawLog, choose_columns, encode
from vouch.data.dataset import Dataset
from vouch.errors import ConfigError, DataError, StorageError, did_you_mean

FORMATS: dict[str, Callable[[Path], RawLog]] = {
    "csv": formats.read_delimited,
    "parquet": formats.read_parquet,
    "jsonl": formats.read_json_lines,
    "recbole": formats.read_recbole,
    "movielens-100k": formats.read_movielens_100k,
    "movielens-1m": formats.read_movielens_1m,
    "sequence": formats.read_sequences,
    "session": formats.read_sessions,
}
"""Names for `format=`. `csv` is any delimiter."""


def read(
    source: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    items: str | Path | None = None,
    name: str | None = None,
) -> Dataset:
    """Read a log, whatever its form, into a `Dataset`.

    Args:
        source: a file (plain or gzipped), a folder (a prepared dataset, MovieLens, RecBole, sequence files, or one
            log file), the word `world` for the embedded world, or the name of a folder in one of `$VOUCH_DATA`.
        format: one of `FORMATS` where the content does not tell.
        columns: the file's column for each of `user`, `item`, `time`, `value`, `scenario`, `domain`.
        items: a table of items (CSV, Parquet, JSON lines) with an id column, if it does not lie with the log.
        name: what to call the dataset; the source's name by default.

    Raises:
        StorageError: there is no such source, or it cannot be opened.
        DataError: it is empty, damaged, of no known form, or holds rows that cannot be used.
        ConfigError: `format` or a role in `columns` is unknown.
    """
    if str(source) == "world" and not Path("world").exists():
        from vouch.data.world import WorldConfig, build

        return build(WorldConfig()).dataset
    path = find_source(source)
    if path.is_dir() and (path / "dataset.json").exists():
        return Dataset.open(path)
    with tempfile.TemporaryDirectory(prefix="vouch-") as scratch:
        raw = open_source(path, format=format, columns=columns, scratch=Path(scratch))
        log = encode(raw)
    if items is not None:
        raw.items = formats.read_items(find_source(items))
    catalog = Catalog.empty(log.items)
    if raw.items is not None:
        table, id_column = raw.items
        catalog = Catalog.from_frame(log.items, table, id_column=id_column, root=path if path.is_dir() else path.parent)
    users = None
    if raw.users is not None:
        users = Catalog.from_frame(log.users, raw.users[0], id_column=raw.users[1]).table
    return Dataset(log, catalog, users, name or _plain_name(path))


def find_source(source: str | Path) -> Path:
    """The path a source names: itself, or a folder of that name (`-` and `_` alike) in one of `$VOUCH_DATA`.

    Raises:
        StorageError: there is nothing of that name.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    word = str(source).replace("-", "_").lower()
    known: dict[str, Path] = {}
    for root in os.environ.get("VOUCH_DATA", "").split(os.pathsep):
        if root and Path(root).is_dir():
            known.update({child.name.replace("-", "_").lower(): child for child in sorted(Path(root).iterdir())})
    if word in known:
        return known[word]
    hint = did_you_mean(word, known) if known else "check the path; 'world' is the embedded world"
    raise StorageError(f"there is no file or folder {str(source)!r}", hint=hint)


def open_source(path: Path, *, format: str | None, columns: Mapping[str, str] | None, scratch: Path) -> RawLog:
    """Find the form of a source and open it lazily. Gzipped files are unpacked into `scratch` first."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}", hint=did_you_mean(format, FORMATS))
    if path.is_dir():
        raw = _open_folder(path, format, scratch)
    else:
        plain = unpack(path, scratch)
        raw = FORMATS[format or formats.detect(plain)](plain)
        raw.source = path
    chosen = choose_columns(raw.frame.collect_schema().names(), columns, raw.source)
    raw.frame = raw.frame.select([pl.col(column).alias(role) for role, column in chosen.items()])
    return raw


def _open_folder(folder: Path, format: str | None, scratch: Path) -> RawLog:
    """The first layout that fits the folder's files."""
    files = {
        _bare(file.name): file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")
    }

    def plain(name: str) -> Path:
        return unpack(files[name], scratch)

    inter = next((name for name in files if name.endswith(".inter")), None)
    if inter:
        raw = formats.read_recbole(plain(inter))
        stem = inter.removesuffix(".inter")
        if f"{stem}.item" in files:
            raw.items = formats.read_recbole_table(plain(f"{stem}.item"), "item_id")
        if f"{stem}.user" in files:
            raw.users = formats.read_recbole_table(plain(f"{stem}.user"), "user_id")
        raw.source = files[inter]
    elif "u.data" in files:
        raw = formats.read_movielens_100k(plain("u.data"))
        if "u.item" in files:
            raw.items = formats.read_movielens_100k_items(plain("u.item"))
    elif "ratings.dat" in files:
        raw = formats.read_movielens_1m(plain("ratings.dat"))
        if "movies.dat" in files:
            raw.items = formats.read_movielens_1m_items(plain("movies.dat"))
    elif "ratings.csv" in files:
        raw = formats.read_delimited(plain("ratings.csv"))
        raw.source = files["ratings.csv"]
        if "movies.csv" in files:
            raw.items = formats.read_movies_csv(plain("movies.csv"))
    elif "sequences.txt" in files:
        times = plain("times.txt") if "times.txt" in files else None
        raw = formats.read_sequences(plain("sequences.txt"), times=times)
        raw.source = files["sequences.txt"]
        if "item_attributes.json" in files:
            raw.items = formats.read_attributes(plain("item_attributes.json"))
    elif {"history.txt", "test.txt"} <= set(files) or {"train.txt", "test.txt"} <= set(files):
        first = "history.txt" if "history.txt" in files else "train.txt"
        parts = [plain(name) for name in (first, "valid.txt", "test.txt") if name in files]
        raw = formats.read_sequence_parts(parts)
        raw.source = files[first]
    elif {"train_sessions.txt", "test_sessions.txt"} <= set(files):
        raw = formats.read_sessions(plain("train_sessions.txt"), plain("test_sessions.txt"))
        raw.source = files["train_sessions.txt"]
    elif "sessions.txt" in files:
        raw = formats.read_sessions(plain("sessions.txt"))
        raw.source = files["sessions.txt"]
    else:
        logs = [name for name in files if Path(name).suffix in (".csv", ".tsv", ".parquet", ".jsonl", ".ndjson")]
        named = [
            name for name in logs if Path(name).stem in ("log", "interactions", "events", "reviews", "ratings", "inter")
        ]
        choice = named if len(named) == 1 else logs
        if len(choice) != 1:
            found = ", ".join(sorted(files)[:12]) or "nothing"
            raise DataError(
                f"the folder {folder.name!r} has {'no' if not choice else 'more than one'} log that is recognised",
                where=str(folder),
                hint=f"name the file itself; the folder holds {found}",
            )
        unpacked = plain(choice[0])
        raw = FORMATS[format or formats.detect(unpacked)](unpacked)
        raw.source = files[choice[0]]
    return raw


def unpack(path: Path, scratch: Path) -> Path:
    """The path itself, or its unpacked copy in `scratch` where it is gzipped.

    Raises:
        StorageError: the file cannot be opened.
        DataError: it is empty, or the gzip stream is cut short or damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(2)
        if not head:
            raise DataError("the file is empty", where=str(path))
        if head != b"\x1f\x8b":
            return path
        target = scratch / _bare(path.name)
        with gzip.open(path, "rb") as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError("the gzip file is cut short or damaged", where=str(path), hint="fetch it again") from error
    except OSError as error:
        raise StorageError(f"the file cannot be opened: {error.strerror or error}", where=str(path)) from error
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise DataError("the gzip file is damaged", where=str(path), hint="fetch it again") from error
        raise
    if target.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path))
    return target


def _bare(name: str) -> str:
    return name.removesuffix(".gz")


def _plain_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else _bare(path.name).rsplit(".", 1)[0]
