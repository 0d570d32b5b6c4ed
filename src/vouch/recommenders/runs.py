"""Run folders: a trained model with all that is needed to use it and to know where it came from.

run.json       what was trained, on what, how, and what came of it
model/         the recommender (see `Recommender.save`)
data/          the prepared dataset, unless it was trained from one (then run.json holds its path)
checkpoints/   best and last; log.jsonl: every step
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vouch
from vouch.data import Dataset, Split, split
from vouch.data.prepare import check_writable
from vouch.errors import DataError, StorageError
from vouch.files import read_json, write_json
from vouch.recommenders.base import load
from vouch.training.run import FitReport

FORMAT = 1


@dataclass(frozen=True)
class OpenRun:
    """A run folder, opened.

    Attributes:
        path: the folder. header: `run.json`. model: the recommender. dataset: what it was trained on.
    """

    path: Path
    header: dict[str, Any]
    model: Any
    dataset: Dataset

    def split(self) -> Split:
        """The split it was trained on, made again from its description."""
        described = self.header["split"]
        shares = {k: v for k, v in described["settings"].items() if k in ("valid_share", "test_share", "min_history")}
        return split(self.dataset, described["protocol"], **shares)


def begin_run(path: Path, dataset: Dataset, source: str, *, keep_data: bool) -> None:
    """Make the run's folder and keep the dataset in it where it is not a prepared folder already.

    Raises:
        StorageError: the folder cannot be written, or holds something else; found before any training.
    """
    check_writable(path)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not is_run(path))):
        raise StorageError(f"{str(path)!r} exists and is no run", where=str(path), hint="choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write to {str(path)!r}: {error.strerror}", hint="choose another --out") from error
    if keep_data:
        dataset.save(path / "data")
    write_json(path / "begun.json", {"source": source, "fingerprint": dataset.interactions.fingerprint})


def is_run(path: Path) -> bool:
    """Whether a folder is a run, finished or not."""
    return (path / "run.json").exists() or (path / "begun.json").exists()


def finish_run(
    path: Path,
    model: Any,
    made: Split,
    report: FitReport,
    *,
    source: str,
    seed: int,
    metrics: Mapping[str, float],
) -> None:
    """Save the model and `run.json`, the latter last: a folder with it is complete."""
    model.save(path / "model")
    plain = asdict(report)
    plain.pop("history")
    kept = (path / "data").exists()
    write_json(
        path / "run.json",
        {
            "format": FORMAT,
            "version": vouch.__version__,
            "method": model.card.slug,
            "config": model.config.model_dump(mode="json"),
            "seed": seed,
            "data": {
                "source": source,
                "prepared": "data" if kept else str(Path(source).resolve()),
                "name": made.dataset.name,
                "fingerprint": made.dataset.interactions.fingerprint,
            },
            "split": made.describe(),
            "report": plain,
            "validation": dict(metrics),
        },
    )


def open_run(path: Path | str) -> OpenRun:
    """Open a run folder.

    Raises:
        StorageError: there is no finished run there, or a newer version wrote it.
        DataError: its data is gone or was changed since.
    """
    path = Path(path)
    if not (path / "run.json").exists():
        if (path / "begun.json").exists():
            hint = "go on with: vouch train METHOD ... --resume (the last checkpoint is kept)"
            raise StorageError(f"the run in {path.name!r} was not finished", where=str(path), hint=hint)
        raise StorageError(
            f"there is no run in {str(path)!r}", hint="vouch train METHOD --data SOURCE --out RUN makes one"
        )
    header = read_json(path / "run.json")
    if header.get("format", 0) > FORMAT:
        raise StorageError(
            f"the run was written in format {header['format']} by vouch {header.get('version')}; this version "
            f"({vouch.__version__}) reads up to {FORMAT}",
            where=str(path),
            hint="upgrade vouch",
        )
    try:
        prepared, fingerprint = header["data"]["prepared"], header["data"]["fingerprint"]
    except (KeyError, TypeError) as error:
        raise StorageError("run.json is damaged: it names no data", where=str(path), hint="train again") from error
    folder = path / prepared if prepared == "data" else Path(prepared)
    dataset = Dataset.open(folder)
    if dataset.interactions.fingerprint != fingerprint:
        raise DataError("the data was changed since the run was trained", where=str(folder), hint="train again")
    return OpenRun(path, header, load(path / "model"), dataset)
