"""Merging by the name of a method, from files and folders to a file or folder: what `vouch merge` does.

Some methods need weights alone; the others also need a network, to run, and unlabelled inputs of each model's task.
A run folder of this library counts as the weights in it; merging runs can give a run, which recommends.
"""

from __future__ import annotations

import copy
import importlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vouch.config import Config, setting
from vouch.data.images import read_images
from vouch.errors import ConfigError, DataError, StorageError, did_you_mean
from vouch.files import atomic_directory, read_json, write_json
from vouch.merging.adamerging import AdaMergingConfig, adamerging
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.fisher import fisher, fisher_information
from vouch.merging.regmean import gram_matrices, regmean
from vouch.merging.states import Options
from vouch.merging.stored import State, open_state, read_record
from vouch.merging.ties import ties
from vouch.merging.unlabelled import place_of

WEIGHTS = "weights.safetensors"


class AverageConfig(Config):
    """Settings of averaging."""

    weights: tuple[float, ...] = setting((), "of each model; none is as much of each")


class TaskArithmeticConfig(Config):
    """Settings of Task Arithmetic."""

    weight: tuple[float, ...] = setting((0.3,), "of each task vector, or one for all")


class TiesConfig(Config):
    """Settings of TIES."""

    weight: float | None = setting(None, "of what is added to the base; unless given 0.3 for a sum, 1 for a mean")
    keep: float = setting(0.2, "share of entries of each task vector that are kept", gt=0, le=1)
    merge: Literal["sum", "mean"] = setting("sum", "of the entries that agree in sign")


class FisherConfig(Config):
    """Settings of Fisher merging."""

    limit: int = setting(256, "inputs of each task that are used", ge=1)
    normalise: bool = setting(True, "let no model dominate because its predictions are sharp")
    floor: float = setting(1e-6, "least information", ge=0)


class RegMeanConfig(Config):
    """Settings of RegMean."""

    limit: int = setting(256, "inputs of each task that are used", ge=1)
    shrink: float = setting(0.9, "how much of the products between different inputs is kept", ge=0, le=1)


class PlusConfig(AdaMergingConfig):
    """Settings of AdaMerging++."""

    keep: float | None = setting(0.2, "share of entries of each task vector that TIES keeps", gt=0, le=1)


@dataclass(frozen=True)
class Job:
    """What is to be merged; `base`, `network` and `inputs` where there are any."""

    models: dict[str, Path]
    base: Path | None
    network: nn.Module | None
    inputs: dict[str, Tensor]
    options: Options

    def own(self, who: str) -> nn.Module:
        """The network with a model's weights."""
        assert self.network is not None
        return with_state(self.network, open_state(self.models[who]), who)


@dataclass(frozen=True)
class Method:
    """One way of merging: its settings, what it does, and whether it needs a base, and a network with inputs."""

    config: type[Config]
    run: Callable[[Job, Any], object]
    base: bool = False
    inputs: bool = False


def _average(job: Job, config: AverageConfig) -> object:
    return average(job.models, job.base, weights=config.weights or None, **job.options)


def _arithmetic(job: Job, config: TaskArithmeticConfig) -> object:
    assert job.base is not None
    one = config.weight[0] if len(config.weight) == 1 else config.weight
    return task_arithmetic(job.base, job.models, one, **job.options)


def _ties(job: Job, config: TiesConfig) -> object:
    assert job.base is not None
    return ties(job.base, job.models, config.weight, keep=config.keep, merge=config.merge, **job.options)


def _fisher(job: Job, config: FisherConfig) -> object:
    found = {who: fisher_information(job.own(who), x, limit=config.limit, task=who) for who, x in job.inputs.items()}
    return fisher(job.models, found, job.base, normalise=config.normalise, floor=config.floor, **job.options)


def _regmean(job: Job, config: RegMeanConfig) -> object:
    found = {who: gram_matrices(job.own(who), x, limit=config.limit, task=who) for who, x in job.inputs.items()}
    return regmean(job.models, found, job.base, shrink=config.shrink, **job.options)


def _adamerging(job: Job, config: AdaMergingConfig) -> object:
    assert job.base is not None and job.network is not None
    return adamerging(job.network, job.base, job.models, job.inputs, config=config, **job.options)


METHODS = {
    "average": Method(AverageConfig, _average),
    "task-arithmetic": Method(TaskArithmeticConfig, _arithmetic, base=True),
    "ties": Method(TiesConfig, _ties, base=True),
    "fisher": Method(FisherConfig, _fisher, inputs=True),
    "regmean": Method(RegMeanConfig, _regmean, inputs=True),
    "adamerging": Method(AdaMergingConfig, _adamerging, base=True, inputs=True),
    "adamerging++": Method(PlusConfig, _adamerging, base=True, inputs=True),
}


def merge(
    method: str,
    models: Sequence[Path | str],
    out: Path | str,
    *,
    base: Path | str | None = None,
    network: nn.Module | None = None,
    inputs: Sequence[Tensor] = (),
    settings: Sequence[str] = (),
    exclude: Sequence[str] = (),
    max_distance: float | None = 1.0,
) -> dict[str, Any]:
    """Merge files or run folders into `out`, and give the record that is kept with it.

    Args:
        models: safetensors files, indices of sharded ones, folders with one of these, or run folders.
        out: a `.safetensors` file; or a folder, if the models are runs: then a run with the merged weights.
        network, inputs: for methods that need them; inputs of each model's task, in the models' order.
        settings: of the method, as `key=value`. exclude, max_distance: see `Options`.

    Raises:
        ConfigError: an unknown method or setting, or something that the method needs is missing.
        StorageError: a file is missing or damaged, or `out` cannot be written. DataError: the models do not fit.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no way of merging called {method!r}", hint=did_you_mean(method, METHODS))
    kind, out = METHODS[method], Path(out)
    config = kind.config.parse(settings)
    if kind.base and base is None:
        raise ConfigError(f"{method} needs the base that the models were fine-tuned from", hint="give it with --base")
    if kind.inputs and (network is None or not inputs):
        raise ConfigError(
            f"{method} needs a network and unlabelled inputs of each model's task",
            hint="--network module:factory --data A,B,C; or use average, task-arithmetic or ties, which need neither",
        )
    if kind.inputs and len(inputs) != len(models):
        raise ConfigError(f"there are inputs for {len(inputs)} tasks and {len(models)} models", hint="one for each")
    named = dict(zip(names_of(models), map(weights_of, models), strict=True))
    origin = None if base is None else weights_of(base)
    given = dict(zip(named, inputs, strict=True)) if kind.inputs else {}

    def run(target: Path) -> dict[str, Any]:
        options: Options = {"out": target, "exclude": exclude, "max_distance": max_distance}
        kind.run(Job(named, origin, network, given, options), config)
        return read_record(target)

    if out.suffix == ".safetensors":
        return run(out)
    return _as_run(out, [Path(each) for each in ([] if base is None else [base]) + list(models)], run)


def weights_of(source: Path | str) -> Path:
    """The file with the weights of a source.

    Raises:
        StorageError: there is none, or several.
    """
    path = Path(source)
    if not path.is_dir():
        return path
    for inner in (path / "model" / WEIGHTS, path / WEIGHTS):
        if inner.exists():
            return inner
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        what = "several safetensors files" if found else "no safetensors file"
        raise StorageError(f"there is {what} in {str(source)!r}", hint="name the file itself")
    return found[0]


def names_of(sources: Sequence[Path | str]) -> list[str]:
    """A name for each: of its file or folder, with as much of its path as tells them apart."""
    paths = [Path(source).with_suffix("") if Path(source).is_file() else Path(source) for source in sources]
    for parts in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} {number}" for number, path in enumerate(paths)]


def network_of(name: str) -> nn.Module:
    """The network that `module:name` gives: one that is there, or what a class or function makes without arguments.

    Raises:
        ConfigError: it cannot be imported or made, or is no network.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise ConfigError(f"{name!r} is not module:name", hint="for example --network shop.networks:make_encoder")
    sys.path.insert(0, str(Path.cwd()))
    try:
        made = getattr(importlib.import_module(module), attribute)
        made = made if isinstance(made, nn.Module) else made()
    except Exception as error:
        raise ConfigError(f"{name!r} gives no network: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name!r} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


def inputs_of(source: str, size: int | None = None, *, grey: bool = False) -> Tensor:
    """Unlabelled inputs: an array `inputs` of an `.npz` as it is, or pictures as `Images.tensor` gives them.

    Raises:
        StorageError: there is nothing of that name. DataError: it has no such array, or cannot be read.
    """
    if not source.endswith(".npz"):
        return torch.as_tensor(read_images(source).tensor(size, grey=grey))
    if not Path(source).is_file():
        raise StorageError(f"there is no file {source!r}")
    try:
        with np.load(source, allow_pickle=False) as file:
            if "inputs" not in file.files:
                raise DataError(f"{source!r} has no array 'inputs'", hint=did_you_mean("inputs", file.files))
            found = torch.from_numpy(np.ascontiguousarray(file["inputs"]))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{source!r} cannot be read: {error}", hint="write it with numpy.savez") from error
    return found.float() if found.is_floating_point() else found


def with_state(network: nn.Module, state: State, who: str) -> nn.Module:
    """A copy of a network with a model's tensors, also where these are of another size, as heads may be.

    Raises:
        ConfigError: the model lacks a parameter of the network.
    """
    made, device = copy.deepcopy(network), place_of(network)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        if name not in state:
            raise ConfigError(f"model {who!r} has no {name!r}, which the network has")
        value = state[name].detach().to(device, torch.promote_types(state[name].dtype, torch.float32))
        _put(made, name, nn.Parameter(value.clone(), requires_grad=parameter.requires_grad))
    for name, buffer in network.named_buffers():
        if name in state:
            _put(made, name, state[name].detach().to(buffer).clone())
    return made


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, value)


def _as_run(out: Path, sources: Sequence[Path], run: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Merge into a copy of the first run that has the merged weights and a record.

    Raises:
        ConfigError: the sources are no runs. DataError: they are of different methods or items.
    """
    first = sources[0]
    for source in sources:
        if not (source / "run.json").exists():
            raise ConfigError(
                f"--out {str(out)!r} is a folder, which merging runs can give, and {str(source)!r} is no run",
                hint="give an --out that ends in .safetensors",
            )
        if _items(source) != _items(first):
            raise DataError(
                f"{str(source)!r} and {str(first)!r} are of different methods or items",
                hint="merge runs that were trained with one method on one catalogue",
            )
    if out.exists() and any(out.resolve() == source.resolve() for source in sources):
        raise ConfigError(f"--out {str(out)!r} is among what is merged", hint="choose another folder")
    if out.exists() and not (out / "run.json").exists() and any(out.iterdir()):
        raise StorageError(f"{str(out)!r} exists and is no run", hint="choose another --out")
    header = read_json(first / "run.json")
    with atomic_directory(out) as aside:
        shutil.copytree(first / "model", aside / "model", ignore=shutil.ignore_patterns(WEIGHTS))
        record = run(aside / "model" / WEIGHTS)
        described: Mapping[str, Any] = header["data"]
        prepared = str((first / described["prepared"]).resolve())
        write_json(aside / "run.json", {**header, "data": {**described, "prepared": prepared}, "merge": record})
    return record


def _items(run: Path) -> tuple[str, dict[str, bytes]]:
    files = sorted(path for path in (run / "model").rglob("*") if path.is_file() and "items" in path.parts[-2:])
    about = read_json(run / "model" / "recommender.json")
    inside = {str(path.relative_to(run)): path.read_bytes() for path in files}
    return about["method"], inside
