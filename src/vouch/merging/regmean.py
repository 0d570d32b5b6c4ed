"""RegMean: each linear layer of the merged network answers the inputs of every model as that model does.

Source: Dataless Knowledge Fusion by Merging Weights of Language Models, arXiv 2212.09849. For a linear layer with the
weight `W (out, in)` and inputs `X_k` in model `k`, with `G_k = mean x x^T` and its off-diagonal shrunk by `a`,

    Gt_k = a G_k + (1 - a) diag(G_k),    W^T = (sum_k Gt_k)^-1 sum_k Gt_k W_k^T,

which with `a = 1` minimises `sum_k ||X_k W^T - X_k W_k^T||^2`. Other tensors are averaged. It is solved in float64 with
a ridge of `RIDGE` of each mean diagonal, so that inputs that are always 0 (the margins of a picture) get plain means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.merging.states import Family, Models, Options, by_model
from vouch.merging.stored import Source, State, open_state
from vouch.merging.unlabelled import Inputs, call_with, evaluating, moved, once, place_of

RIDGE = 1e-10


def regmean(
    models: Models,
    grams: Mapping[str, Source] | Sequence[Source],
    base: Source | None = None,
    *,
    shrink: float = 0.9,
    **options: Unpack[Options],
) -> State:
    """The models merged by least squares, layer by layer.

    Args:
        models: states, networks or files of one architecture, in a list or by name.
        grams: for each model those of `gram_matrices`; weights without one are averaged.
        base: what the models were fine-tuned from; only for what is not merged, and to check that they descend from it.
        shrink: `a`, how much of the products between different inputs is kept.
        options: `out`, `exclude`, `max_distance`; see `Options`.

    Raises:
        DataError: the models differ, or a matrix does not fit its layer. StorageError: a file cannot be read or
            written. ConfigError: matrices are missing, or `shrink` lies outside [0, 1].
    """
    if not 0 <= shrink <= 1:
        raise ConfigError(f"shrink is {shrink}; it must lie in [0, 1]")
    family = Family(models, base, **options)
    given = by_model(grams, family.names, "matrices")
    found = {who: open_state(source) for who, source in given.items()}  # type: ignore[arg-type]

    def recipe(name: str, base: Tensor | None, models_K: Tensor) -> Tensor:
        if any(name not in state for state in found.values()):
            return models_K.mean(0)
        size = models_K.shape[-1]
        left = torch.zeros(size, size, dtype=torch.float64, device=models_K.device)
        right = torch.zeros(size, models_K.shape[1], dtype=torch.float64, device=models_K.device)
        for (who, state), weight in zip(found.items(), models_K.double(), strict=True):
            gram = _shrunk(who, name, state[name].to(left), size, shrink)
            left += gram
            right += gram @ weight.T
        if not bool(left.diagonal().any()):
            return models_K.mean(0)
        return torch.linalg.solve(left, right).T.to(models_K)

    return family.merge(recipe, "regmean", shrink=shrink)


def gram_matrices(
    encoder: nn.Module, inputs: Inputs, *, limit: int = 256, batch_size: int = 64, task: str = "the task"
) -> dict[str, Tensor]:
    """`mean x x^T` `(in, in)`, float32, of the inputs of every linear layer, by the name of its weight.

    Needs inputs but no labels; the network is in evaluation mode meanwhile. Inputs of every position (token, patch)
    count. Layers whose weights are used without calling them, as inside `nn.MultiheadAttention`, have none.

    Args:
        inputs: see `Inputs`. limit: most of them that are used; whole batches. task: its name in messages.

    Raises:
        DataError: there are no inputs. ConfigError: the network cannot read them, or calls no linear layer.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).double()
            sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    hooks = [
        module.register_forward_pre_hook(listen(f"{name}.weight" if name else "weight"))
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear)
    ]
    seen = 0
    try:
        with evaluating(encoder), torch.no_grad():
            for batch in once(task, inputs, min(batch_size, limit)):
                if seen >= limit:
                    break
                batch = moved(batch, place_of(encoder))
                call_with(encoder, batch, task)
                seen += len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
    finally:
        for each in hooks:
            each.remove()
    if not sums:
        raise ConfigError("the network calls no nn.Linear, so there is nothing to fit", hint="use average or fisher")
    return {name: (sums[name] / counts[name]).float() for name in sums}


def _shrunk(who: str, name: str, gram: Tensor, size: int, shrink: float) -> Tensor:
    if tuple(gram.shape) != (size, size):
        raise DataError(
            f"the matrix of {name!r} of model {who!r} has the shape {tuple(gram.shape)}, not {(size, size)}"
        )
    if not bool(torch.isfinite(gram).all()):
        raise DataError(
            f"the matrix of {name!r} of model {who!r} has values that are not finite",
            hint="look for such values in its inputs",
        )
    diagonal = gram.diagonal()
    return shrink * gram + torch.diag((1 - shrink) * diagonal + RIDGE * diagonal.mean())
