"""Fisher merging: each weight is a mean over models, weighted by how much that model's predictions depend on it.

Source: Merging Models with Fisher-Weighted Averaging, arXiv 2111.09832: `theta = sum_k F_k theta_k / sum_k F_k`,
element by element, with the diagonal Fisher information `F = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2`. The
expectation over `y` is exact, over all classes, and the square is taken input by input (squaring the gradient of a sum
over a batch, as some implementations do, gives something else). The information is used as a share of its length by
default, so that no model dominates because its predictions are sharp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.merging.states import Family, Models, Options, by_model
from vouch.merging.stored import Source, State, open_state
from vouch.merging.unlabelled import Head, Inputs, encode, evaluating, moved, once, place_of


def fisher(
    models: Models,
    information: Mapping[str, Source] | Sequence[Source],
    base: Source | None = None,
    *,
    normalise: bool = True,
    floor: float = 1e-6,
    **options: Unpack[Options],
) -> State:
    """The mean of the models, weighted element by element by their Fisher information.

    Args:
        models: states, networks or files of one architecture, in a list or by name.
        information: for each model that of `fisher_information`; tensors without one are averaged plainly.
        base: what the models were fine-tuned from; only for what is not merged, and to check that they descend from it.
        normalise: divide each model's information by its length over all tensors.
        floor: least information, as a share of that length.
        options: `out`, `exclude`, `max_distance`; see `Options`.

    Raises:
        DataError: the models differ, or their information does not fit them. StorageError: a file cannot be read or
            written. ConfigError: information is missing, or `floor` is negative.
    """
    if floor < 0:
        raise ConfigError(f"floor is {floor}; it must not be negative")
    family = Family(models, base, **options)
    given = by_model(information, family.names, "information")
    found = {who: open_state(source) for who, source in given.items()}  # type: ignore[arg-type]
    length = {who: _length(who, state, family) for who, state in found.items()}

    def recipe(name: str, base: Tensor | None, models_K: Tensor) -> Tensor:
        if any(name not in state for state in found.values()):
            return models_K.mean(0)
        parts = []
        for who, state in found.items():
            part = state[name].to(models_K).clamp(min=floor * length[who])
            parts.append(part / length[who] if normalise and length[who] > 0 else part)
        weight_K = torch.stack(parts)
        total = weight_K.sum(0)
        merged = (weight_K * models_K).sum(0) / total.clamp(min=torch.finfo(total.dtype).tiny)
        return torch.where(total > 0, merged, models_K.mean(0))

    return family.merge(recipe, "fisher", normalise=normalise, floor=floor)


def fisher_information(
    encoder: nn.Module,
    inputs: Inputs,
    head: Head | None = None,
    *,
    limit: int = 256,
    classes_at_once: int = 64,
    task: str = "the task",
) -> dict[str, Tensor]:
    """The diagonal Fisher information of every trained parameter of a network, under the head of its task.

    Needs inputs but no labels; the network is in evaluation mode meanwhile. One forward pass and, for each
    `classes_at_once` classes, one batched backward pass an input.

    Args:
        inputs: see `Inputs`. head: from features to logits; without, the network gives logits.
        limit: most inputs that are used. task: its name in messages.

    Raises:
        DataError: there are no inputs. ConfigError: the network cannot read them or does not give features `(B, D)`, or
            nothing is trained.
    """
    named = {name: parameter for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    if not named:
        raise ConfigError("no parameter of the network requires a gradient")
    parameters, seen = list(named.values()), 0
    total = [torch.zeros_like(parameter) for parameter in parameters]
    with evaluating(encoder, head), torch.enable_grad():
        for x in once(task, inputs, 1):
            for row in _rows(moved(x, place_of(encoder))):
                if seen == limit:
                    break
                seen += 1
                log_p_C = encode(encoder, row, head, task).log_softmax(1)[0]
                # sum_c p_c g_c^2 = sum_c (sqrt(p_c) g_c)^2
                root_CC = torch.diag(log_p_C.detach().exp().sqrt())
                blocks = root_CC.split(classes_at_once)
                for number, block in enumerate(blocks):
                    gradients = torch.autograd.grad(
                        log_p_C, parameters, block, retain_graph=number + 1 < len(blocks),
                        allow_unused=True, is_grads_batched=True,
                    )  # fmt: skip
                    for sum_, gradient in zip(total, gradients, strict=True):
                        if gradient is not None:
                            sum_ += gradient.square().sum(0)
    return {name: value / seen for name, value in zip(named, total, strict=True)}


def _rows(x: object) -> list[object]:
    """A batch as batches of one."""
    if isinstance(x, Tensor):
        return list(x.split(1))
    assert isinstance(x, Mapping)
    size = len(next(iter(x.values())))
    return [{key: value[row : row + 1] for key, value in x.items()} for row in range(size)]


def _length(who: str, state: State, family: Family) -> float:
    """The length of a model's information over all tensors."""
    total = 0.0
    for name in family.parameters:
        if name not in state:
            continue
        if tuple(state[name].shape) != family.layout[name][1]:
            raise DataError(
                f"the information of {name!r} of model {who!r} has the shape {tuple(state[name].shape)}, "
                f"the parameter {family.layout[name][1]}"
            )
        if bool((state[name] < 0).any()) or not bool(torch.isfinite(state[name]).all()):
            raise DataError(
                f"the information of {name!r} of model {who!r} is negative or not finite",
                hint="look for such values in its inputs",
            )
        total += float(state[name].double().square().sum())
    return total**0.5
