"""What networks give at named positions: at their output, or at that of a layer inside, corrected on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vouch.errors import ConfigError, DataError
from vouch.merging.stored import Source, open_state
from vouch.merging.unlabelled import Endless, Inputs, call_with, moved, once, place_of

OUTPUT = ""
"""The position of a network's own output; layers go by their names."""
Pair = tuple[Tensor, Tensor]
"""Features of the merged and of the individual network for the same inputs."""


class Individual:
    """A task's own network: as it is, or as a state that the merged network's code is run with."""

    def __init__(self, task: str, source: nn.Module | Source, encoder: nn.Module) -> None:
        self.module: nn.Module = source if isinstance(source, nn.Module) else encoder
        self.state: dict[str, Tensor] | None = None
        if isinstance(source, nn.Module):
            return
        state, self.state, known = open_state(source), {}, set()
        for name, mine in encoder.state_dict(keep_vars=True).items():
            if name not in state or state[name].shape != mine.shape:
                what = "has no" if name not in state else f"has the shape {tuple(state[name].shape)} of"
                raise DataError(
                    f"the individual state of task {task!r} {what} {name!r}, which the merged network has"
                    + (f" with {tuple(mine.shape)}" if name in state else ""),
                    hint="give the state of the same encoder, or the network itself",
                )
            if id(mine) not in known:  # tied parameters are given once
                self.state[name] = state[name].to(mine)
            known.add(id(mine))

    def __call__(self, *args: Any, **named: Any) -> Any:
        """What the individual network gives."""
        if self.state is None:
            return self.module(*args, **named)
        return torch.func.functional_call(self.module, self.state, args, named)


class Pairs:
    """Features of both networks for all inputs of a task: kept, or computed again each time.

    Attributes:
        size: how many inputs there are. shape: of a batch of features. constant: whether all inputs have the same.
    """

    def __init__(
        self, task: str, inputs: Inputs, pair: Callable[[Any], Pair], *, cache: bool, batch_size: int, seed: int
    ) -> None:
        self.task, self.inputs, self.pair = task, inputs, pair
        self.kept: Pair | None = None
        if cache:
            parts = [pair(x) for x in once(task, inputs)]
            self.kept = torch.cat([z for z, _ in parts]), torch.cat([target for _, target in parts])
        self.stream = Endless(task, self.kept or inputs, batch_size, seed)
        self.size, low, high = 0, torch.tensor(math.inf), torch.tensor(-math.inf)
        for z, _ in self:
            self.size, self.shape, self.device = self.size + len(z), z.shape, z.device
            low, high = torch.minimum(low.to(z), z.amin(0)), torch.maximum(high.to(z), z.amax(0))
        self.constant = torch.equal(low, high)

    def __iter__(self) -> Iterator[Pair]:
        """All of them."""
        if self.kept is not None:
            yield self.kept
        else:
            yield from (self.pair(x) for x in once(self.task, self.inputs))

    def next(self) -> Pair:
        """Those of the next batch."""
        first, second = self.stream.next()
        if self.kept is None:  # `second` is labels, if anything
            return self.pair(first)
        assert second is not None
        return first, second


def look(
    call: Callable[..., Any], module: nn.Module, x: Any, position: str, corrections: Mapping[str, nn.Module], task: str
) -> Tensor:
    """The output of a network for a batch, or that of one layer, with earlier layers corrected.

    Raises:
        ConfigError: the network cannot read the batch, gives no tensor with a row for each input, or does not call the
            layer exactly once.
    """
    x, found = moved(x, place_of(module)), []
    hooks: dict[str, Any] = {name: partial(_corrected, each) for name, each in corrections.items() if name != OUTPUT}
    if position != OUTPUT:
        if position not in dict(module.named_modules()):
            raise ConfigError(f"the individual network has no layer {position!r}")
        hooks[position] = lambda module, inputs, output: found.append(_first(output))
    with hooked(module, hooks):
        out = call_with(call, x, task)
    if position != OUTPUT and len(found) != 1:
        raise ConfigError(
            f"layer {position!r} is called {len(found)} times for a batch", hint="correct layers that are called once"
        )
    z = out if position == OUTPUT else found[0]
    rows = len(next(iter(x.values()))) if isinstance(x, Mapping) else len(x)
    if not isinstance(z, Tensor) or z.ndim < 2 or len(z) != rows:
        what = f"a tensor of the shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"a {type(z).__name__}"
        where = f"layer {position!r}" if position else "the network"
        raise ConfigError(
            f"{where} gave {what} for {rows} inputs, not features (B, D)",
            hint="wrap the network so that it returns its pooled features, inputs first",
        )
    return z


def in_order(module: nn.Module, layers: Sequence[str], x: Any) -> list[str]:
    """Names of layers in the order in which the network comes to them; those that it does not come to, last."""
    seen: list[str] = []
    with hooked(module, {name: (lambda *_, name=name: seen.append(name)) for name in layers}):
        call_with(module, moved(x, place_of(module)))
    return [*dict.fromkeys(seen), *(name for name in layers if name not in seen)]


def _first(output: Any) -> Any:
    """What a layer gives, where it gives several things."""
    return output[0] if isinstance(output, tuple) else output


def _corrected(correction: nn.Module, module: nn.Module, inputs: Any, output: Any) -> Any:
    z = correction(_first(output))
    return (z, *output[1:]) if isinstance(output, tuple) else z


@contextlib.contextmanager
def hooked(module: nn.Module, hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Listen to layers, or change what they give."""
    handles = [module.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
