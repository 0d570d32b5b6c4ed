"""A family of states: a base and the models made from it, checked to be of one architecture, and merged tensor by tensor.

Every merging method is a recipe for one tensor: from the base's and the `K` models' it makes the merged one. `Family`
does the rest: names and shapes, what is not merged, precision, and the file. What is done with each tensor:

- floating point: by the recipe, in float32 (float64 stays), written back in its own type;
- running statistics and other buffers of floating point: the mean of the models, with a warning, since statistics of
  merged weights are not the mean of the statistics;
- integers and truth values: the base's;
- excluded by name, such as heads: the base's, or left out where the base has none;
- tied parameters (one tensor of a network under several names): merged once.

`K` is the number of models; `x_K` has the models in front.
"""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vouch import __version__
from vouch.errors import ConfigError, DataError, did_you_mean
from vouch.merging.stored import Kind, Source, State, StateFile, file_order, fingerprint, kinds, open_state, write_state

Models = Mapping[str, Source] | Sequence[Source]
Recipe = Callable[[str, Tensor | None, Tensor], Tensor]
"""Of the name of a tensor, the base's (if there is a base) and the models' `(K, ...)`: the merged one."""
STATISTICS = ("running_mean", "running_var")
SHOWN = 5
"""Differences that an error lists."""


class Options(TypedDict, total=False):
    """What every merging function takes besides its own arguments.

    Attributes:
        out: a safetensors file to write to, one tensor at a time; the result is then that file, opened.
        exclude: patterns of names that are not merged, such as `head.*`.
        max_distance: longest way from the base, as a share of the base's length, that a model may have gone.
            Networks that were trained from different beginnings are about 1.4 apart; None does not look.
    """

    out: str | Path | None
    exclude: Sequence[str]
    max_distance: float | None


class Family:
    """Models of one architecture, and perhaps their common base.

    Attributes:
        models: by name. base: or None.
        parameters: names of the tensors that recipes merge, tied ones once. statistics: of those that are averaged.
        tied: other names of tied tensors, and the name they are merged under.
    """

    def __init__(
        self,
        models: Models,
        base: Source | None = None,
        *,
        out: str | Path | None = None,
        exclude: Sequence[str] = (),
        max_distance: float | None = 1.0,
        network: nn.Module | None = None,
    ) -> None:
        """Open and check the states; see `Options`. A `network` of this architecture tells buffers and tied parameters.

        Raises:
            ConfigError: there is no model, or `models` is not a collection of states.
            DataError: the models differ; the message names the first tensors that do.
            StorageError: a file cannot be read.
        """
        self.out, self.max_distance = out, max_distance
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.models = opened(models)
        self.base = None if base is None else open_state(base)
        if self.base is not None and not self.base:
            raise DataError("the base has no tensors")
        first = next(iter(self.models.values()))
        self.reference = first if self.base is None else self.base
        self.layout = {name: kind for name, kind in kinds(self.reference).items() if not self._excluded(name)}
        self._check_same()
        modules = [each for each in (network, base, *_values(models)) if isinstance(each, nn.Module)]
        known = {name for module in modules for name, _ in module.named_buffers()}
        floating = [name for name, (dtype, _) in self.layout.items() if dtype.is_floating_point]
        self.tied = _tied(_places(self.reference), floating)
        for module in modules:
            self.tied |= _tied({name: id(p) for name, p in module.named_parameters(remove_duplicate=False)}, floating)
        free = [name for name in floating if name not in self.tied]
        self.statistics = [name for name in free if name in known or name.rsplit(".", 1)[-1] in STATISTICS]
        self.parameters = [name for name in free if name not in set(self.statistics)]
        self._measured: set[str] = set()
        self._squares = [0.0] * (1 + len(self.models))  # of the base, and of each way from it

    @property
    def names(self) -> list[str]:
        """Of the models."""
        return list(self.models)

    def read(self, name: str) -> tuple[Tensor | None, Tensor]:
        """One tensor of the base (None without one) and of all models `(K, ...)`, in float32 or float64.

        Raises:
            DataError: it has values that are not finite; names the model.
        """
        base = None if self.base is None else self._finite("the base", name, self.base[name])
        device = self.reference[name].device if not isinstance(self.reference, StateFile) else torch.device("cpu")
        found = [self._finite(f"model {who!r}", name, state[name]).to(device) for who, state in self.models.items()]
        stacked = torch.stack(found)
        if base is not None and base.ndim > 1 and name not in self._measured:
            self._measured.add(name)
            for at, each in enumerate((base, *(stacked - base))):
                self._squares[at] += float(torch.linalg.vector_norm(each, dtype=torch.float64)) ** 2
        return base, stacked

    def vectors(self, name: str) -> Tensor:
        """The task vectors `theta_k - theta_0` of one tensor `(K, ...)`."""
        base, models_K = self.read(name)
        assert base is not None
        return models_K - base

    def check_distance(self) -> None:
        """Refuse models that are too far from the base, by the weight matrices read so far.

        Raises:
            DataError: a model is more than `max_distance` away.
        """
        if self.max_distance is None or not self._squares[0]:
            return
        far = [(square / self._squares[0]) ** 0.5 for square in self._squares[1:]]
        worst = max(range(len(far)), key=far.__getitem__)
        if far[worst] > self.max_distance:
            raise DataError(
                f"model {self.names[worst]!r} is {far[worst]:.2f} times the base's length away from the base: "
                "it does not seem to descend from it",
                hint="merge models that were fine-tuned from this base, or pass max_distance=None if they were",
            )

    def merge(self, recipe: Recipe, method: str, **settings: Any) -> State:
        """The merged state, in memory or, where there is an `out`, in that file with a record of how it was made.

        Raises:
            DataError: values that are not finite, before or after, or models too far from the base.
            StorageError: a file cannot be read or written.
        """
        if self.statistics:
            self._warn()
        layout = {**self.layout, **self._kept_kinds()}
        if self.out is not None:
            record = self.record(method, settings)
            write_state(self.out, layout, self._merged(file_order(layout), recipe), record)
            return StateFile(self.out)
        aliases = {alias for alias in self.tied if alias in layout}
        merged = dict(self._merged([name for name in layout if name not in aliases], recipe))
        return {name: merged[self.tied.get(name, name)] for name in layout}

    def record(self, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """How a merged state is made: method, settings, and the hashes of what it is made from; plain JSON."""
        sources = {who: fingerprint(state) for who, state in self.models.items()}
        return {
            "method": method,
            "settings": dict(settings),
            "exclude": list(self.exclude),
            "base": None if self.base is None else fingerprint(self.base),
            "models": sources,
            "version": __version__,
        }

    def _merged(self, names: Sequence[str], recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        parameters, statistics = set(self.parameters), set(self.statistics)
        for name in names:
            at = self.tied.get(name, name)
            if at in parameters or at in statistics:
                base, models_K = self.read(at)
                made = recipe(at, base, models_K) if at in parameters else models_K.mean(0)
                made = made.to(self.layout[at][0])
                if not _is_finite(made):
                    raise DataError(
                        f"merging gives values of {name!r} that are not finite in {made.dtype}",
                        hint="lower the weight, or convert the models to float32 first",
                    )
                yield name, made
            elif self.base is not None and name in self.base:
                yield name, self.base[name].detach().clone()
            else:  # no base: what all agree on, or the largest, as for a count of batches seen
                values = torch.stack([state[name] for state in self.models.values()])
                yield name, values.long().amax(0).to(values.dtype) if values.dtype != torch.bool else values.any(0)
        self.check_distance()

    def _kept_kinds(self) -> dict[str, Kind]:
        return {} if self.base is None else {n: kind for n, kind in kinds(self.base).items() if self._excluded(n)}

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)

    def _warn(self) -> None:
        warnings.warn(
            f"{len(self.statistics)} running statistics or buffers, such as {self.statistics[0]!r}, are the mean of "
            "the models'; those of batch normalisation should be estimated anew on unlabelled data, for example with "
            "torch.optim.swa_utils.update_bn",
            stacklevel=4,
        )

    def _check_same(self) -> None:
        """Every model has the tensors of the reference."""
        against = "the base" if self.base is not None else f"model {self.names[0]!r}"
        if not any(dtype.is_floating_point for dtype, _ in self.layout.values()):
            raise DataError(f"{against} has no tensor of floating point that could be merged")
        for name, (dtype, _) in self.layout.items():
            if dtype.is_complex:
                raise DataError(f"{name!r} of {against} is complex", hint="exclude it, or merge its real view")
        for who, state in self.models.items():
            found = {name: kind for name, kind in kinds(state).items() if not self._excluded(name)}
            differ = []
            for name, (dtype, shape) in self.layout.items():
                if name not in found:
                    differ.append(f"{name!r} is missing")
                elif found[name][1] != shape:
                    differ.append(f"{name!r} has the shape {found[name][1]}, not {shape}")
                elif found[name][0] != dtype:
                    differ.append(f"{name!r} is of type {found[name][0]}, not {dtype}")
            differ += [f"{name!r} is not in {against}" for name in found if name not in self.layout]
            if differ:
                more = f"; and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
                raise DataError(
                    f"model {who!r} is not of the architecture of {against}: {'; '.join(differ[:SHOWN])}{more}",
                    hint="merge models of one architecture; leave heads out with exclude=('head.*',), and convert "
                    "types with state = {name: t.float() for name, t in state.items()}",
                )

    def _finite(self, who: str, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if not _is_finite(tensor):
            raise DataError(f"{name!r} of {who} has values that are not finite", hint="train that model again")
        return tensor if tensor.dtype == torch.float64 else tensor.float()


def opened(models: Models) -> dict[str, State]:
    """Models by name, opened; files without a name are called after themselves, others `model 0`, `model 1`, ....

    Raises:
        ConfigError: there is none, or it is one state and not several.
    """
    if isinstance(models, str | Path | nn.Module) or (
        isinstance(models, Mapping) and any(isinstance(value, Tensor) for value in models.values())
    ):
        raise ConfigError("models is a single state", hint="give a list of states, or a mapping from names to states")
    if isinstance(models, Mapping):
        named = dict(models)
    else:
        named = {}
        for number, source in enumerate(models):
            name = Path(source).stem if isinstance(source, str | Path) else f"model {number}"
            named[name if name not in named else f"{name} {number}"] = source
    if not named:
        raise ConfigError("there is no model to merge")
    return {str(name): open_state(source) for name, source in named.items()}


def required(base: Source | None) -> Source:
    """The base, where a method cannot do without.

    Raises:
        ConfigError: there is none.
    """
    if base is None:
        raise ConfigError("there is no base", hint="give the state that the models were fine-tuned from")
    return base


def by_model(values: object, names: Sequence[str], what: str) -> dict[str, object]:
    """One value for each model, from a mapping by name or a sequence in the models' order.

    Raises:
        ConfigError: a model has none, or there is one of no model.
    """
    if isinstance(values, Mapping):
        for name in names:
            if name not in values:
                raise ConfigError(f"there are no {what} of model {name!r}", hint=did_you_mean(name, map(str, values)))
        for name in values:
            if name not in names:
                raise ConfigError(f"{what} are given for {name!r}, which is no model", hint=did_you_mean(name, names))
        return {name: values[name] for name in names}
    listed = list(values)  # type: ignore[call-overload]
    if len(listed) != len(names):
        raise ConfigError(f"{len(listed)} {what} for {len(names)} models")
    return dict(zip(names, listed, strict=True))


def _values(models: Models) -> list[Source]:
    return list(models.values()) if isinstance(models, Mapping) else list(models)


def _places(state: State) -> dict[str, object]:
    """Where in memory each tensor lies. Files hold copies, and so no ties."""
    if isinstance(state, StateFile):
        return {}
    return {
        name: (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        for name, tensor in state.items()
        if tensor.numel()
    }


def _tied(places: Mapping[str, object], names: Sequence[str]) -> dict[str, str]:
    """Names whose tensor is the same as that of an earlier name, and the first such name."""
    first: dict[object, str] = {}
    return {name: first[at] for name in names if (at := places.get(name)) and first.setdefault(at, name) != name}


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all())
