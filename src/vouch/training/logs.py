"""The training log: one JSON line a step, one an epoch; and MLflow where asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vouch.errors import ConfigError, StorageError


class TrainingLog:
    """Appends to `log.jsonl`; lines of a step are `{"step", "epoch", "loss", ...}`, of an epoch also `"metrics"`."""

    def __init__(
        self, path: Path | None, *, mlflow: str | None = None, settings: Mapping[str, Any] | None = None, keep: int = 0
    ):
        """Open the log; lines of epochs after `keep` (left by a run that was killed) are dropped."""
        self._path, self._file, self._mlflow = path, None, None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                kept = _lines_up_to(path, keep) if keep else []
                path.write_text("".join(kept), encoding="utf-8")
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise StorageError(f"cannot write the training log: {error.strerror}", where=str(path)) from error
        if mlflow is not None:
            self._mlflow = _mlflow(mlflow)
            self._mlflow.start_run()
            self._mlflow.log_params(dict(settings or {}))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        if self._mlflow is not None:
            self._mlflow.end_run(status="FINISHED" if kind is None else "FAILED")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and flush."""
        if self._file is not None:
            try:
                self._file.write("".join(json.dumps(row) + "\n" for row in rows))
                self._file.flush()
            except OSError as error:
                raise StorageError(
                    f"cannot write the training log: {error.strerror}",
                    where=str(self._path),
                    hint="free some disk space",
                ) from error
        if self._mlflow is not None:
            for row in rows:
                numbers = {**row, **row.get("metrics", {})}
                values = {_plain(k): v for k, v in numbers.items() if isinstance(v, float)}
                self._mlflow.log_metrics(values, step=row["step"])


def _plain(name: str) -> str:
    return name.replace("@", "_at_").replace("~", "_")  # MLflow allows few signs in names


def _lines_up_to(path: Path, epoch: int) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["epoch"] <= epoch:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            break  # a line cut short by a kill
    return kept


def _mlflow(uri: str) -> Any:
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise ConfigError(
            "MLflow logging was asked for, but mlflow is not installed", hint="pip install 'vouch[mlflow]'"
        ) from error
    mlflow.set_tracking_uri(uri)
    return mlflow
