"""`vouch merge`, and merging files and runs by the name of a method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from torch import nn

from vouch.cli.merge import add_to
from vouch.errors import ConfigError, DataError, StorageError
from vouch.merging.adamerging import adamerging
from vouch.merging.arithmetic import task_arithmetic
from vouch.merging.fisher import fisher, fisher_information
from vouch.merging.merge import METHODS, names_of, network_of, weights_of
from vouch.merging.regmean import gram_matrices, regmean

NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 99))

made = make()
number = 3
"""


def network(classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, two models with heads of their own size, inputs, and a module with their network."""
    torch.manual_seed(0)
    base = network(3)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    for name, classes, value in (("east", 3, 0.1), ("west", 5, -0.2)):
        state = {n: x + value * torch.randn_like(x) for n, x in base.state_dict().items()}
        state |= {f"2.{n}": x for n, x in nn.Linear(8, classes).state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
        np.savez(tmp_path / f"{name}.npz", inputs=torch.randn(64, 6).double().numpy())
    (tmp_path / "shop_networks.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def vouch(capsys: pytest.CaptureFixture[str]):
    app = typer.Typer()
    app.callback()(lambda: None)
    add_to(app)

    def call(*words: object) -> Any:
        capsys.readouterr()
        typer.main.get_command(app).main(["merge", *map(str, words)], standalone_mode=False)
        return capsys.readouterr().out

    return call


COMMON = ("--models", "east.safetensors,west.safetensors", "--out", "out.safetensors", "--exclude", "2.*")
LEARN = ("--network", "shop_networks:make", "--data", "east.npz,west.npz")


def same(left: Any, right: Any) -> None:
    assert set(left) == set(right)
    for name in right:
        torch.testing.assert_close(left[name], right[name])


def test_weights_alone(folder: Path, vouch) -> None:
    said = json.loads(vouch(*COMMON, "--base", "base.safetensors", "--method", "task-arithmetic", "--set",
                            "weight=0.5,0.25", "--json"))  # fmt: skip
    models = ["east.safetensors", "west.safetensors"]
    wanted = task_arithmetic("base.safetensors", models, [0.5, 0.25], exclude=["2.*"])
    same(load_file("out.safetensors"), wanted)
    assert said["method"] == "task-arithmetic" and said["settings"]["weight"] == [0.5, 0.25]
    assert set(said["models"]) == {"east", "west"} and len(said["models"]["east"]["sha256"]) == 64
    assert said["exclude"] == ["2.*"]
    vouch(*COMMON)
    assert set(load_file("out.safetensors")) == {"0.weight", "0.bias"}
    assert "merged east, west by ties" in vouch(*COMMON, "--base", "base.safetensors", "--method", "ties")


def test_methods_that_look_at_inputs(folder: Path, vouch) -> None:
    """They are the library's, each model with its own head."""
    files = {name: f"{name}.safetensors" for name in ("east", "west")}
    x = {name: torch.from_numpy(np.load(f"{name}.npz")["inputs"]).float() for name in files}
    own = {}
    for name, classes in (("east", 3), ("west", 5)):
        own[name] = network(classes)
        own[name].load_state_dict(load_file(files[name]))
    vouch(*COMMON, *LEARN, "--method", "fisher", "--set", "limit=20")
    information = {name: fisher_information(own[name], x[name], limit=20) for name in files}
    same(load_file("out.safetensors"), fisher(files, information, exclude=["2.*"]))
    vouch(*COMMON, *LEARN, "--method", "regmean", "--set", "shrink=0.95")
    grams = {name: gram_matrices(own[name], x[name]) for name in files}
    same(load_file("out.safetensors"), regmean(files, grams, shrink=0.95, exclude=["2.*"]))
    for method, keep in (("adamerging", None), ("adamerging++", 0.2)):
        said = vouch(*COMMON, *LEARN, "--base", "base.safetensors", "--method", method, "--set", "steps=5")
        assert f"by {method} into" in said and "coefficients, mean over the tensors: east 0." in said
        wanted = adamerging(network(9), "base.safetensors", files, x, exclude=["2.*"], steps=5, keep=keep)
        same(load_file("out.safetensors"), wanted.state)


def test_pictures_as_inputs(folder: Path, vouch) -> None:
    from PIL import Image

    (folder / "shop_pictures.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))\n"
    )
    for name in ("one", "two"):
        (folder / name / "any").mkdir(parents=True)
        for number in range(6):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / "any" / f"{number}.png")
        save_file({"1.weight": torch.randn(2, 16), "1.bias": torch.zeros(2)}, folder / f"{name}.safetensors")
    vouch("--models", "one.safetensors,two.safetensors", "--method", "regmean", "--network", "shop_pictures:make",
          "--data", "one,two", "--size", 4, "--grey", "--out", "p.safetensors")  # fmt: skip
    assert set(load_file("p.safetensors")) == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("words", "error", "match"),
    [
        ((*COMMON, "--method", "tie"), ConfigError, "'tie'[^?]*did you mean 'ties'"),
        ((*COMMON, "--method", "ties"), ConfigError, "ties needs the base"),
        ((*COMMON, "--base", "base.safetensors", "--method", "adamerging"), ConfigError, "needs a network"),
        ((*COMMON, *LEARN[:3], "east.npz", "--method", "fisher"), ConfigError, "1 tasks and 2 models"),
        ((*COMMON, "--set", "weight=1"), ConfigError, "no setting 'weight'"),
        ((*COMMON, "--models", " , "), ConfigError, "names no model"),
        ((*COMMON, "--models", "nowhere.safetensors"), StorageError, "nowhere.safetensors"),
        (COMMON[:4], DataError, r"'2.weight' has the shape"),
        ((*COMMON, "--out", "somewhere"), ConfigError, "is no run"),
        ((*COMMON, *LEARN[:3], "east.npz,missing.npz", "--method", "fisher"), StorageError, "missing.npz"),
        ((*COMMON, "--network", "shop_networks", *LEARN[2:], "--method", "fisher"), ConfigError, "not module:name"),
        ((*COMMON, "--network", "shop_networks:none", *LEARN[2:], "--method", "fisher"), ConfigError, "AttributeError"),
        ((*COMMON, "--network", "shop_networks:number", *LEARN[2:], "--method", "fisher"), ConfigError, "no network"),
        ((*COMMON, "--network", "nothing:make", *LEARN[2:], "--method", "fisher"), ConfigError, "no network"),
    ],
)
def test_mistakes_are_told(folder: Path, vouch, words, error, match) -> None:
    with pytest.raises(error, match=match):
        vouch(*words)
    assert not (folder / "out.safetensors").exists() and not list(folder.glob(".*"))


def test_inputs_without_the_array(folder: Path, vouch) -> None:
    np.savez("other.npz", input=np.zeros(3))
    with pytest.raises(DataError, match="did you mean 'input'"):
        vouch(*COMMON, *LEARN[:3], "east.npz,other.npz", "--method", "fisher")


def test_names_and_places(folder: Path) -> None:
    assert isinstance(network_of("shop_networks:made"), nn.Module)
    for name in ("a", "b"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes((folder / "base.safetensors").read_bytes())
    assert names_of(["a/model.safetensors", "b/model.safetensors"]) == ["a/model", "b/model"]
    assert names_of(["a", "b", "base.safetensors"]) == ["a", "b", "base"]
    assert weights_of("a") == Path("a/model.safetensors")
    (folder / "a" / "more.safetensors").write_bytes(b"")
    for place, what in (("a", "several"), (".", "several")):
        with pytest.raises(StorageError, match=what):
            weights_of(place)
    (folder / "c").mkdir()
    with pytest.raises(StorageError, match="no safetensors file in 'c'"):
        weights_of("c")


def test_every_method_has_documented_settings() -> None:
    for kind in METHODS.values():
        assert all(row.description for row in kind.config.rows())


def test_runs_become_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vouch) -> None:
    """Two recommenders trained with other seeds from one catalogue; the merged one recommends."""
    from vouch.cli.main import main
    from vouch.recommenders.runs import open_run

    monkeypatch.chdir(tmp_path)
    rows = [f"u{user},i{(user + step) % 12},{step}" for user in range(20) for step in range(6)]
    Path("log.csv").write_text("user,item,time\n" + "\n".join(rows) + "\n", encoding="utf-8")
    for seed in range(2):
        done = main(["train", "bpr", "--data", "log.csv", "--out", f"run{seed}", "--seed", str(seed),
                     "--set", "epochs=2"])  # fmt: skip
        assert done == 0
    vouch("--models", "run0,run1", "--out", "merged")
    merged, one, two = (open_run(name) for name in ("merged", "run0", "run1"))
    state = merged.model.state()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, (one.model.state()[name] + two.model.state()[name]) / 2)
    assert merged.header["merge"]["method"] == "average" and set(merged.header["merge"]["models"]) == {"run0", "run1"}
    assert main(["recommend", "merged", "--user", "u1"]) == 0
    with pytest.raises(ConfigError, match="among what is merged"):
        vouch("--models", "run0,run1", "--out", "run0")
    Path("other.csv").write_text("user,item,time\n" + "\n".join(rows).replace("i3", "j3") + "\n", encoding="utf-8")
    assert main(["train", "bpr", "--data", "other.csv", "--out", "other", "--set", "epochs=1"]) == 0
    with pytest.raises(DataError, match="different methods or items"):
        vouch("--models", "run0,other", "--out", "merged2")
    assert not Path("merged2").exists()
