"""Weight averaging and Task Arithmetic: merging by one weighted sum.

Sources: Model soups, arXiv 2203.05482 (averaging); Editing Models with Task Arithmetic, arXiv 2212.04089. With the
weight `1 / K` for each of `K` models the second is the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor

from vouch.errors import ConfigError
from vouch.merging.states import Family, Models, Options, by_model, required
from vouch.merging.stored import Source, State

Weight = float | Sequence[float] | Mapping[str, float]
"""One weight for all models, one for each in their order, or by their names."""


def average(
    models: Models, base: Source | None = None, *, weights: Weight | None = None, **options: Unpack[Options]
) -> State:
    """The mean of the models' weights, or with `weights` their weighted mean (the weights are made to sum to 1).

    Args:
        models: states, networks or files of one architecture, in a list or by name.
        base: what they were fine-tuned from; only for what is not merged, and to check that they descend from it.
        options: `out`, `exclude`, `max_distance`; see `Options`.

    Raises:
        DataError: the models differ, or have values that are not finite. StorageError: a file cannot be read or
            written. ConfigError: weights that do not fit, are negative or all 0.
    """
    family = Family(models, base, **options)
    weight_K = weights_of(1.0 if weights is None else weights, family.names)
    if bool((weight_K < 0).any()) or float(weight_K.sum()) <= 0:
        raise ConfigError(f"the weights are {weight_K.tolist()}; none may be negative, nor all 0")
    weight_K /= weight_K.sum()
    listed = weight_K.tolist()
    return family.merge(lambda name, base, models_K: weighted(weight_K, models_K), "average", weights=listed)


def task_arithmetic(
    base: Source, models: Models, weight: Weight | Mapping[str, Sequence[float]] = 0.3, **options: Unpack[Options]
) -> State:
    """`theta_0 + sum_k weight_k (theta_k - theta_0)`.

    Args:
        base: what the models were fine-tuned from. models: states, networks or files, in a list or by name.
        weight: for all models, one for each, or for each tensor by its name one for each model, as AdaMerging learns
            them. The paper of AdaMerging uses 0.3 for eight tasks; it is best chosen on labelled validation data.
        options: `out`, `exclude`, `max_distance`; see `Options`.

    Raises:
        DataError: the models differ, have values that are not finite, or do not descend from the base.
        StorageError: a file cannot be read or written. ConfigError: weights that do not fit the models, or no base.
    """
    family = Family(models, required(base), **options)
    if isinstance(weight, Mapping) and weight and isinstance(next(iter(weight.values())), Sequence):
        by_tensor = by_model(weight, family.parameters, "weights")
        weights = {name: weights_of(row, family.names) for name, row in by_tensor.items()}  # type: ignore[arg-type]
        told: object = {name: row.tolist() for name, row in weights.items()}
    else:
        same = weights_of(weight, family.names)  # type: ignore[arg-type]
        weights, told = dict.fromkeys(family.parameters, same), same.tolist()

    def recipe(name: str, base: Tensor | None, models_K: Tensor) -> Tensor:
        assert base is not None
        return base + weighted(weights[name], models_K - base)

    return family.merge(recipe, "task-arithmetic", weight=told)


def weighted(weight_K: Tensor, x_K: Tensor) -> Tensor:
    """`sum_k weight_k x_k` `(...)`."""
    return torch.tensordot(weight_K.to(x_K), x_K, dims=1)


def weights_of(weight: Weight, names: Sequence[str]) -> Tensor:
    """The weights as `(K,)` in float64.

    Raises:
        ConfigError: there are too few or too many, or one is not a finite number.
    """
    if isinstance(weight, Mapping | Sequence):
        listed = [float(value) for value in by_model(weight, names, "weights").values()]  # type: ignore[arg-type]
    else:
        listed = [float(weight)] * len(names)
    found = torch.tensor(listed, dtype=torch.float64)
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(f"the weights are {listed}; they must be finite numbers")
    return found
