"""Reading logs of every usual form. What a source is, is told from its content, its name and its neighbours."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vouch.data import formats, releases, sequences
from vouch.data.catalog import Catalog
from vouch.data.columns import File, RawLog, encode
from vouch.data.dataset import Dataset
from vouch.errors import ConfigError, DataError, StorageError, did_you_mean

FORMATS: dict[str, Callable[[File], RawLog]] = {
    "csv": formats.read_delimited,
    "parquet": formats.read_parquet,
    "jsonl": formats.read_json_lines,
    "recbole": releases.read_recbole,
    "movielens-100k": releases.read_movielens_100k,
    "movielens-1m": releases.read_movielens_1m,
    "sequence": sequences.read_sequences,
    "session": sequences.read_sessions,
}
"""Names for `format=`. `csv` is any delimiter."""

LOGS = ("log", "interactions", "events", "reviews", "ratings", "clicks", "transactions")
ITEMS = ("items", "movies", "products", "catalog")
USERS = ("users",)
TABLES = (".csv", ".tsv", ".parquet", ".pq", ".jsonl", ".ndjson")


def read(
    source: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    items: str | Path | None = None,
    users: str | Path | None = None,
    name: str | None = None,
) -> Dataset:
    """Read a log, whatever its form, into a `Dataset`.

    Args:
        source: a file (plain or gzipped), a folder (a prepared dataset, MovieLens, RecBole, sequence files, Parquet
            parts, or one log file), the word `world` for the embedded world, or the name of a folder in one of the
            folders that `$VOUCH_DATA` lists.
        format: one of `FORMATS` where the content does not tell.
        columns: the file's column for each of `user`, `item`, `time`, `value`, `scenario`, `domain`; an empty name
            leaves a column out; and for `feedback` the columns of further signals, joined by `+`.
        items, users: tables of items and users (CSV, Parquet, JSON lines) with an id column, if they do not lie with
            the log.
        name: what to call the dataset; the source's name by default.

    Raises:
        StorageError: there is no such source, or it cannot be opened.
        DataError: it is empty, damaged, of no known form, or holds rows that cannot be used.
        ConfigError: `format` or a role in `columns` is unknown, or the source needs neither.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}", hint=did_you_mean(format, FORMATS))
    ready = _ready(source)
    if ready is not None:
        for word, value in (("format", format), ("columns", columns), ("items", items), ("users", users)):
            if value:
                raise ConfigError(f"{str(source)!r} is prepared already; {word} does not apply", hint="leave it out")
        return ready if name is None else replace(ready, name=name)
    path = find_source(source)
    with tempfile.TemporaryDirectory(prefix="vouch-") as scratch:
        raw = _open(path, format, Path(scratch))
        if items is not None:
            raw.items = formats.read_table(unpack(find_source(items), Path(scratch)), "item")
        if users is not None:
            raw.users = formats.read_table(unpack(find_source(users), Path(scratch)), "user")
        raw.choose(columns)
        log = encode(raw)
    catalog, people = Catalog.empty(log.items), None
    if raw.items is not None:
        table, id_column = raw.items
        catalog = Catalog.from_frame(log.items, table, id_column=id_column, root=path if path.is_dir() else path.parent)
    if raw.users is not None:
        people = Catalog.from_frame(log.users, raw.users[0], id_column=raw.users[1]).table
    return Dataset(log, catalog, people, name or _plain_name(path))


def _ready(source: str | Path) -> Dataset | None:
    """The embedded world or a prepared dataset, if the source is one."""
    if str(source) == "world" and not Path("world").exists():
        from vouch.data.world import WorldConfig, build

        return build(WorldConfig()).dataset
    path = find_source(source)
    return Dataset.open(path) if path.is_dir() and (path / "dataset.json").exists() else None


def find_source(source: str | Path) -> Path:
    """The path a source names: itself, or a folder of that name (`-` and `_` alike) in one of `$VOUCH_DATA`.

    Raises:
        StorageError: there is nothing of that name.
    """
    if not str(source).strip():
        raise StorageError("the source is empty", hint="name a file, a folder, or 'world'")
    path = Path(source).expanduser()
    known: dict[str, Path] = {}
    try:
        if path.exists():
            return path
        for root in os.environ.get("VOUCH_DATA", "").split(os.pathsep):
            if root and Path(root).is_dir():
                known.update({_word(child.name): child for child in sorted(Path(root).iterdir())})
    except OSError as error:
        raise _cannot_open(path, error) from error
    if _word(str(source)) in known:
        return known[_word(str(source))]
    hint = did_you_mean(_word(str(source)), known) if known else "check the path; 'world' is the embedded world"
    raise StorageError(f"there is no file or folder {str(source)!r}", hint=hint)


def _word(name: str) -> str:
    return name.replace("-", "_").lower()


@dataclass(frozen=True)
class _Folder:
    """A folder whose files are found by name, gzipped or not, and unpacked when asked for."""

    path: Path
    scratch: Path

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file() or (self.path / f"{name}.gz").is_file()

    def file(self, name: str) -> File:
        plain = self.path / name
        return unpack(plain if plain.is_file() else self.path / f"{name}.gz", self.scratch)

    def maybe(self, name: str) -> File | None:
        return self.file(name) if name in self else None

    def names(self) -> list[str]:
        """The names of its files, without `.gz`; hidden files are not seen."""
        try:
            found = {_bare(child.name) for child in self.path.iterdir() if child.is_file()}
        except OSError as error:
            raise _cannot_open(self.path, error) from error
        return sorted(name for name in found if not name.startswith("."))


def _open(path: Path, format: str | None, scratch: Path) -> RawLog:
    """Find the form of a source and open it lazily. Gzipped files are unpacked into `scratch` first."""
    if path.is_dir():
        folder = _Folder(path, scratch)
        return _open_release(folder, folder.names(), format) or _open_tables(folder, format)
    if format is None:
        known = _with_companions(_Folder(path.parent, scratch), _bare(path.name))
        if known is not None:
            return known
    file = unpack(path, scratch)
    return FORMATS[format or formats.detect(file)](file)


def _open_release(folder: _Folder, names: list[str], format: str | None) -> RawLog | None:
    """The log of a folder laid out in one of the known ways, or None."""
    if format not in (None, "recbole", "movielens-100k", "movielens-1m", "sequence", "session"):
        return None
    inter = [name for name in names if name.endswith(".inter")]
    if len(inter) > 1:
        raise DataError(
            f"the folder has {len(inter)} logs: {', '.join(inter[:8])}",
            where=str(folder.path),
            hint="name the file itself",
        )
    for main in (*inter, "u.data", "ratings.dat", "ratings.csv", "sequences.txt"):
        if main in names:
            raw = _with_companions(folder, main)
            if raw is not None:
                return raw
    for first in ("history.txt", "train.txt"):
        if first in names and "test.txt" in names:
            parts = [folder.file(name) for name in (first, "valid.txt", "test.txt") if name in names]
            return sequences.read_sequence_parts(parts)
    if "train_sessions.txt" in names and "test_sessions.txt" in names:
        return sequences.read_sessions(folder.file("train_sessions.txt"), folder.file("test_sessions.txt"))
    return sequences.read_sessions(folder.file("sessions.txt")) if "sessions.txt" in names else None


def _with_companions(folder: _Folder, main: str) -> RawLog | None:
    """A log whose name says what lies beside it (items, users, times), with those; None for any other name."""
    if main.endswith(".inter"):
        raw, stem = releases.read_recbole(folder.file(main)), main.removesuffix(".inter")
        if f"{stem}.item" in folder:
            raw.items = releases.read_recbole_table(folder.file(f"{stem}.item"), "item_id")
        if f"{stem}.user" in folder:
            raw.users = releases.read_recbole_table(folder.file(f"{stem}.user"), "user_id")
        return raw
    if main == "u.data":
        raw = releases.read_movielens_100k(folder.file(main))
        raw.items = releases.read_movielens_100k_items(folder.file("u.item")) if "u.item" in folder else None
        raw.users = releases.read_movielens_100k_users(folder.file("u.user")) if "u.user" in folder else None
        return raw
    if main == "ratings.dat":
        raw = releases.read_movielens_1m(folder.file(main))
        raw.items = releases.read_movielens_1m_items(folder.file("movies.dat")) if "movies.dat" in folder else None
        raw.users = releases.read_movielens_1m_users(folder.file("users.dat")) if "users.dat" in folder else None
        return raw
    if main == "ratings.csv" and "movies.csv" in folder:
        raw = formats.read_delimited(folder.file(main))
        raw.items = releases.read_movies_csv(folder.file("movies.csv"))
        return raw
    if main.startswith("sequences") and main.endswith(".txt"):
        raw = sequences.read_sequences(folder.file(main), times=folder.maybe("times.txt"))
        if "item_attributes.json" in folder:
            raw.items = sequences.read_attributes(folder.file("item_attributes.json"))
        return raw
    return None


def _open_tables(folder: _Folder, format: str | None) -> RawLog:
    """The one log among a folder's tables, with its tables of items and users, if they are called so."""
    names = folder.names()
    tables = [name for name in names if Path(name).suffix.lower() in TABLES]
    logs = [name for name in tables if Path(name).stem.lower() in LOGS]
    others = [name for name in tables if Path(name).stem.lower() not in (*ITEMS, *USERS)]
    chosen = logs if len(logs) == 1 else others
    if len(chosen) > 1 and all(Path(name).suffix.lower() in (".parquet", ".pq") for name in chosen) and not logs:
        return formats.read_parquet(*[folder.file(name) for name in chosen])
    if len(chosen) != 1:
        raise DataError(
            f"the folder {folder.path.name!r} has {'no' if not chosen else 'more than one'} log that is recognised",
            where=str(folder.path),
            hint=f"name the file itself; the folder holds {', '.join(names[:12]) or 'nothing'}",
        )
    file = folder.file(chosen[0])
    raw = FORMATS[format or formats.detect(file)](file)
    for name in tables:
        if name not in chosen and Path(name).stem.lower() in ITEMS:
            raw.items = formats.read_table(folder.file(name), "item")
        if name not in chosen and Path(name).stem.lower() in USERS:
            raw.users = formats.read_table(folder.file(name), "user")
    return raw


def unpack(path: Path, scratch: Path) -> File:
    """The file itself, or its unpacked copy in `scratch` where it is gzipped.

    Raises:
        StorageError: the file cannot be opened, is no plain file, or there is no room to unpack it.
        DataError: it is empty, or the gzip stream is cut short or damaged.
    """
    if not path.is_file():
        raise StorageError(f"{path.name!r} is no plain file", where=str(path), hint="save the data to a file first")
    try:
        with path.open("rb") as file:
            magic = file.read(2)
        if not magic:
            raise DataError("the file is empty", where=str(path))
        if magic != b"\x1f\x8b":
            return File(path, path)
        # In a folder of its own, so that files of one name do not collide and the name still tells the format.
        target = Path(tempfile.mkdtemp(dir=scratch)) / _bare(path.name)
        with gzip.open(path, "rb") as packed, target.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError("the gzip file is cut short or damaged", where=str(path), hint="fetch it again") from error
    except OSError as error:
        raise _cannot_open(path, error) from error
    if target.stat().st_size == 0:
        raise DataError("the file is empty", where=str(path))
    return File(target, path)


def _cannot_open(path: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(f"{path.name!r} cannot be read: {reason}", where=str(path), hint="check its permissions")


def _bare(name: str) -> str:
    return name.removesuffix(".gz")


def _plain_name(path: Path) -> str:
    return path.resolve().name if path.is_dir() else _bare(path.name).rsplit(".", 1)[0]
