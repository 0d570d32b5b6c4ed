"""How alike two networks see the same inputs: linear centred kernel alignment (CKA), layer by layer.

Source: Similarity of Neural Network Representations Revisited, arXiv 1905.00414.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, did_you_mean

TINY = 1e-12


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """`|A'B|^2 / (|A'A| |B'B|)` of the same `n` inputs' features `(n, p)` and `(n, q)`, columns centred: in [0, 1].

    It is 1 for features that differ by a rotation and a scale; 0 where either is constant.
    """
    a, b = a - a.mean(0), b - b.mean(0)
    if max(a.shape[1], b.shape[1]) > len(a):  # the same numbers from the smaller matrices
        kernel_a, kernel_b = a @ a.T, b @ b.T
        cross, size = (kernel_a * kernel_b).sum(), kernel_a.norm() * kernel_b.norm()
    else:
        cross, size = (a.T @ b).square().sum(), (a.T @ a).norm() * (b.T @ b).norm()
    return (cross / size.clamp(min=TINY)).clamp(0, 1)


def compared_layers(network: nn.Module, names: Sequence[str] = ()) -> list[str]:
    """The modules whose outputs are compared: those named, else every layer with a weight matrix, and the whole.

    Raises:
        ConfigError: the network has no such module.
    """
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules:
            raise ConfigError(f"the network has no layer {name!r}", hint=did_you_mean(name, modules))
    if names:
        return list(names)
    weights = {name: getattr(module, "weight", None) for name, module in modules.items() if name}
    return [name for name, weight in weights.items() if isinstance(weight, Tensor) and weight.ndim > 1] + [""]


def layer_outputs(network: nn.Module, names: Sequence[str], inputs: Tensor) -> dict[str, Tensor]:
    """What the named modules give for `inputs (n, ...)`, flattened to `(n, p)`; a module that is not called is left out."""
    found: dict[str, Tensor] = {}
    modules = dict(network.named_modules())

    def keep(name: str) -> object:
        def hook(module: nn.Module, args: object, output: object) -> None:
            del module, args
            if isinstance(output, Tensor) and len(output) == len(inputs):
                found[name] = output.flatten(1)

        return modules[name].register_forward_hook(hook)

    handles = [keep(name) for name in names]
    try:
        network(inputs)
    finally:
        for handle in handles:
            handle.remove()  # type: ignore[attr-defined]
    return found


def dissimilarity(new: nn.Module, old: nn.Module, names: Sequence[str], inputs: Tensor) -> Tensor:
    """The mean over layers of `1 - CKA(new's outputs, old's)`; `old` gets no gradient."""
    with torch.no_grad():
        before = layer_outputs(old, names, inputs)
    after = layer_outputs(new, names, inputs)
    return torch.stack([1 - linear_cka(after[name], before[name]) for name in names if name in after]).mean()


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode for the block."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
