"""The training log on disk, and in MLflow."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import toy

from vouch.errors import ConfigError, StorageError
from vouch.training import Run, TrainConfig, fit
from vouch.training.logs import TrainingLog


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_later_epochs_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [{"step": n, "epoch": 1 + n // 3, "loss": 0.5} for n in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "epo')
    with TrainingLog(path, keep=2) as log:
        log.write([{"step": 6, "epoch": 3, "loss": 0.1}])
    assert rows(path) == [*lines[:6], {"step": 6, "epoch": 3, "loss": 0.1}]
    with TrainingLog(path):
        pass
    assert path.read_text() == ""


@pytest.mark.parametrize("left", ["", "{", "[]\n", '{"step": 1}\n', "\xff\xfe\n"])
def test_a_damaged_log_does_not_stop_a_resumed_run(left: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "epoch": 1}\n' + left, encoding="latin-1")
    with TrainingLog(path, keep=5):
        pass
    assert rows(path) == [{"step": 1, "epoch": 1}]


def test_a_log_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot"):
        TrainingLog(tmp_path / "file" / "log.jsonl")
    with (
        pytest.raises(StorageError, match="No space left on device") as error,
        TrainingLog(tmp_path / "log.jsonl") as log,
    ):
        log._file = open("/dev/full", "w")  # noqa: SIM115
        log.write([{"step": 1, "epoch": 1, "text": "x" * 100_000}])
    assert error.value.where == str(tmp_path / "log.jsonl")


def test_without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="mlflow is not installed") as error:
        toy_fit("file:somewhere")
    assert error.value.hint == "pip install 'vouch[mlflow]'"


class Client:
    """Stands in for MLflow's client, and keeps what it is given."""

    made: list[Client] = []
    broken: str = ""

    def __init__(self, tracking_uri: str) -> None:
        self.uri, self.status, self.params, self.metrics = tracking_uri, "", {}, []
        Client.made.append(self)

    def get_experiment_by_name(self, name: str) -> Any:
        if self.broken == "always":
            raise ConnectionError("no server")
        return None

    def create_experiment(self, name: str) -> str:
        return name

    def create_run(self, experiment: str) -> Any:
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"{experiment}/1"))

    def log_batch(self, run: str, metrics: Any = (), params: Any = ()) -> None:
        assert run == "vouch/1" and len(metrics) <= 1000
        if self.broken == "later" and metrics:
            raise ConnectionError("gone away")
        self.params.update(params)
        self.metrics.extend(metrics)

    def set_terminated(self, run: str, status: str) -> None:
        self.status = status


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> type[Client]:
    entities = types.ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)  # type: ignore[attr-defined]
    entities.Param = lambda key, value: (key, value)  # type: ignore[attr-defined]
    package = types.ModuleType("mlflow")
    package.MlflowClient, package.entities = Client, entities  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setattr(Client, "made", [])
    monkeypatch.setattr(Client, "broken", "")
    return Client


def toy_fit(uri: str, **settings: Any) -> Any:
    model = toy.Toy()
    config = TrainConfig(epochs=2, monitor="hit@1", **settings)
    metrics = lambda: {"hit@1": model.hits()["hit"]}  # noqa: E731
    return fit(model, toy.Bags(), config=config, run=Run(device="cpu", mlflow=uri), validate=metrics)


def test_mlflow_gets_every_metric(client: type[Client]) -> None:
    report = toy_fit("file:here")
    (made,) = client.made
    assert (made.uri, made.status, made.params["epochs"]) == ("file:here", "FINISHED", "2")
    losses = [(step, value) for key, value, step in made.metrics if key == "entropy" and step not in (6, 12)]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    hits = [(step, value) for key, value, step in made.metrics if key == "hit_at_1"]
    assert hits == [(6, report.history[0]["hit@1"]), (12, report.history[1]["hit@1"])]


def test_mlflow_learns_of_failures(client: type[Client]) -> None:
    with pytest.raises(ConfigError, match="monitor"):
        fit(toy.Toy(), toy.Bags(), config=TrainConfig(epochs=1), run=Run(device="cpu", mlflow="x"), validate=dict)
    assert client.made[0].status == "FAILED"


def test_mlflow_that_does_not_answer(client: type[Client], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "broken", "always")
    with pytest.raises(ConfigError, match="'http://nowhere' cannot be used: no server"):
        toy_fit("http://nowhere")
    monkeypatch.setattr(client, "broken", "later")  # a long training goes on
    with pytest.warns(UserWarning, match="gone away"):
        assert toy_fit("http://nowhere").epochs == 2
