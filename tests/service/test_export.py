from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_run

from vouch import load
from vouch.cli.main import main
from vouch.data import Queries
from vouch.errors import ConfigError
from vouch.recommenders import Recommender
from vouch.service.engine import Engine
from vouch.service.export import export
from vouch.service.onnx import query_network

HISTORIES = [["i3", "i9"], ["i11", "i3", "i11", "i4", "i5", "i6", "i7", "i8", "i0", "i1"], ["i30"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


def trained(folder: Path, slug: str) -> Path:
    return folder / slug if (folder / slug).exists() else small_run(folder / slug, slug)


def best_by_product(out: Path, query: np.ndarray[Any, Any], k: int) -> list[list[str]]:
    """The best items by the files alone."""
    about = json.loads((out / "about.json").read_text())
    vectors, ids = np.load(out / "items.npy"), json.loads((out / "items.json").read_text())
    scores = query @ vectors.T
    if scores.ndim == 3:
        scores = scores.max(1) if about["interests"] == "max" else scores.sum(1)
    return [[ids[code] for code in np.argsort(-row, kind="stable")[:k]] for row in scores]


def as_model_reads(model: Recommender, network: Any) -> tuple[torch.Tensor, ...]:
    """The histories as the exported network takes them."""
    codes = [model.items.codes(history)[-min(network.most, 100) :] for history in HISTORIES]  # type: ignore[union-attr]
    history = np.full((len(codes), max(map(len, codes))), -1, np.int64)
    for row, each in enumerate(codes):
        history[row, : len(each)] = each
    length = np.array([len(each) for each in codes])
    given = {"history": history, "length": length, "user": np.array([0, 5, 7])}
    return tuple(torch.from_numpy(given[name]) for name in network.names)


@pytest.mark.parametrize("slug", ["sasrec", "bert4rec", "gru4rec", "comirec-sa", "comirec-dr", "srgnn", "fism", "bpr"])
def test_the_network_and_the_vectors_rank_as_the_model(slug: str, folder: Path) -> None:
    """What is exported, before it is written as ONNX: the same items as the engine gives."""
    run = trained(folder, slug)
    out = folder / f"{slug}-vectors"
    about = export(run, out, "vectors")
    engine = Engine.open(run)
    assert about["items"] == 40 and np.load(out / "items.npy").dtype == np.float32
    network = query_network(engine.scoring).eval()
    with torch.no_grad():
        query = network(*as_model_reads(engine.model, network)).numpy()
    codes = [engine.items.codes(history) for history in HISTORIES]
    users = np.array([0, 5, 7]) if slug == "bpr" else None
    ranking = engine.model.recommend(Queries.from_histories(codes, user=users), 5, exclude="none")
    assert best_by_product(out, query, 5) == [engine.items.ids(row) for row in ranking.item]


@pytest.mark.parametrize("slug", ["sasrec", "fism"])
def test_onnx_gives_the_models_vectors(slug: str, folder: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    out = folder / f"{slug}-onnx"
    about = export(trained(folder, slug), out, "onnx")["onnx"]
    assert about["largest_difference"] < 1e-4
    session = runtime.InferenceSession(str(out / "query.onnx"))
    model = load(folder / slug / "model")
    network = query_network(Engine.open(folder / slug).scoring).eval()
    given = as_model_reads(model, network)
    assert set(about["inputs"]) == set(network.names)
    query = session.run(None, {name: value.numpy() for name, value in zip(network.names, given, strict=True)})[0]
    codes = [model.items.codes(history) for history in HISTORIES]
    ranking = model.recommend(Queries.from_histories(codes), 5, exclude="none")
    assert best_by_product(out, query, 5) == [model.items.ids(row) for row in ranking.item]


def test_a_network_that_cannot_be_written_is_told_in_a_line(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """As those of GCL4SR and SR-GNN, whose graphs depend on the data."""
    pytest.importorskip("onnxscript")

    def fails(*args: Any, **settings: Any) -> None:
        try:
            raise ValueError("\x1b[96mno operator\x1b[0m nonzero\nand a long story")
        except ValueError as cause:
            raise RuntimeError("the export failed\nfor a reason") from cause

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ConfigError, match=r"SASRec cannot be written as ONNX: .*no operator") as caught:
        export(trained(folder, "sasrec"), tmp_path / "out", "onnx")
    assert "\n" not in caught.value.what and "\x1b[" not in caught.value.what
    assert "vectors" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = trained(folder, "sasrec"), folder / "by-command"
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert "40 item vectors of size 16" in capsys.readouterr().out
    assert main(["export", str(run), "--out", str(out), "--json"]) == 0  # over the old one
    assert json.loads(capsys.readouterr().out)["method"] == "sasrec"
    assert main(["export", str(run), "--out", str(run)]) == 2
    assert "is no export" in capsys.readouterr().err
    assert (run / "run.json").exists()


def test_what_cannot_be_exported_is_said(folder: Path, tmp_path: Path) -> None:
    run = trained(folder, "itemknn")
    with pytest.raises(ConfigError, match="does not rank by products"):
        export(run, tmp_path / "out", "vectors")
    with pytest.raises(ConfigError, match="no format 'pmml'"):
        export(run, tmp_path / "out", "pmml")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_without_onnx_one_is_told(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="needs onnx") as caught:
        export(trained(folder, "sasrec"), tmp_path / "out", "onnx")
    assert "vouch[export]" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []
