"""The training log: one JSON line a step, one an epoch; and MLflow where asked for."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vouch.errors import ConfigError, StorageError
from vouch.files import atomic_file

MLFLOW_BATCH = 1000
"""Most metrics that MLflow takes in one request."""


class TrainingLog:
    """Appends to `log.jsonl`.

    A step's line is `{"step", "epoch", "loss", ...}`, an epoch's `{"step", "epoch", "seconds", "metrics": {...}}`.
    """

    def __init__(
        self, path: Path | None, *, mlflow: str | None = None, settings: Mapping[str, Any] | None = None, keep: int = 0
    ) -> None:
        """Open the log; lines of epochs after `keep` (left by a run that was killed) are dropped.

        Raises:
            StorageError: the log cannot be written.
            ConfigError: MLflow is asked for and not installed, or does not answer.
        """
        self._path, self._file = path, None
        if path is not None:
            kept = _lines_up_to(path, keep)
            with atomic_file(path) as aside:
                aside.write_text(kept, encoding="utf-8")
            try:
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise self._explain(error) from error
        self._mlflow = None if mlflow is None else _MLflow(mlflow, settings or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._mlflow is not None:
            self._mlflow.end("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and flush.

        Raises:
            StorageError: the log cannot be written, on a full disk for example.
        """
        if self._file is not None:
            try:
                self._file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
                self._file.flush()
            except OSError as error:
                self._close()
                raise self._explain(error) from error
        if self._mlflow is not None:
            self._mlflow.write(rows)

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # every write was flushed: all that can be left is what failed
                self._file.close()
            self._file = None

    def _explain(self, error: OSError) -> StorageError:
        return StorageError(
            f"the training log cannot be written: {error.strerror}",
            where=str(self._path),
            hint="free some disk space and go on with --resume, or choose another --out",
        )


def _lines_up_to(path: Path, epoch: int) -> str:
    kept = []
    if epoch and path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                if json.loads(line)["epoch"] > epoch:
                    break
            except (json.JSONDecodeError, KeyError, TypeError):
                break  # a line cut short by a kill
            kept.append(line)
    return "".join(kept)


class _MLflow:
    """One MLflow run, through its client: no global run is touched."""

    def __init__(self, uri: str, settings: Mapping[str, Any]) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ModuleNotFoundError as error:
            raise ConfigError(
                "MLflow logging was asked for, but mlflow is not installed", hint="pip install 'vouch[mlflow]'"
            ) from error
        self._metric = Metric
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name("vouch")
            experiment = found.experiment_id if found else self._client.create_experiment("vouch")
            self._run = self._client.create_run(experiment).info.run_id
            params = [Param(name, str(value)) for name, value in settings.items()]
            self._client.log_batch(self._run, params=params[:100])
        except Exception as error:  # whatever the store or the network raises
            raise ConfigError(f"MLflow at {uri!r} cannot be used: {error}", hint="check the tracking URI") from error

    def write(self, rows: list[dict[str, Any]]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(name.replace("@", "_at_").replace("~", "_"), value, now, row["step"])  # it allows few signs
            for row in rows
            for name, value in {**row, **row.get("metrics", {})}.items()
            if isinstance(value, float)
        ]
        for first in range(0, len(metrics), MLFLOW_BATCH):
            self._try(
                lambda part=metrics[first : first + MLFLOW_BATCH]: self._client.log_batch(self._run, metrics=part)
            )

    def end(self, status: str) -> None:
        self._try(lambda: self._client.set_terminated(self._run, status))

    def _try(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # a tracking server that is down must not end a long training
            warnings.warn(f"MLflow did not take a part of the log: {error}", stacklevel=2)
