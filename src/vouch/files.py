"""Writing files so that nothing half-written is ever seen: write aside, then rename."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vouch.errors import StorageError


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _explain(error: OSError, path: Path) -> StorageError:
    reason = error.strerror or str(error)
    return StorageError(
        f"cannot write {path.name!r}: {reason}",
        where=str(path),
        hint="choose a folder you may write to, on a disk with free space",
    )


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place only if the block succeeds.

    Raises:
        StorageError: the folder cannot be written (permissions, full disk, a file in the way).
    """
    path = Path(path)
    aside, old = _aside(path), _aside(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        if path.exists():
            path.rename(old)
        aside.rename(path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not path.exists():  # the second rename failed: put the old one back
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes its place only if the block succeeds.

    Raises:
        StorageError: the file cannot be written (permissions, full disk).
    """
    path = Path(path)
    aside = _aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        raise _explain(error, path) from error
    finally:
        with contextlib.suppress(OSError):  # its folder may not even be one
            aside.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """Read a JSON file.

    Raises:
        StorageError: the file is missing, unreadable or not JSON.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"there is no file {path.name!r}", where=str(path.parent)) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path.name!r} cannot be read as JSON: {error}", where=str(path)) from error
