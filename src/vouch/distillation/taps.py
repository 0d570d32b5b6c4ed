"""What two different networks can be compared by: outputs at several depths, pooled to common lengths.

Shapes: `B` batch, `C` channels or classes, `P` positions (all axes after the channels, flattened), `d` a common length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.errors import ConfigError, did_you_mean

Pooling = Literal["average", "max"]
Similarity = Literal["cross-entropy", "l1", "l2", "softmax-l1", "softmax-l2"]


def outputs(given: Any) -> list[Tensor]:
    """What a network gave, as a list with the logits last.

    A list or tuple is taken as it is. An object with `logits`, as some libraries give (beside auxiliary answers), is
    taken for these alone.
    """
    logits = getattr(given, "logits", None)
    if logits is not None:
        return [logits]
    return list(given) if isinstance(given, (tuple, list)) else [given]


class Tapped:
    """A network that gives its outputs at several depths: `[f_1, ..., f_J, logits]`, shallow first.

    With names of modules, their outputs are taken by forward hooks, and the network's own output is the logits. Without,
    the network is one that returns such a list itself, or only the logits. The network is not wrapped and not changed;
    `close` (or leaving the `with` block) takes the hooks off.

    Raises:
        ConfigError: the network has no module of a name.
    """

    def __init__(self, network: nn.Module, taps: Sequence[str] = (), name: str = "the network") -> None:
        self.network, self.taps, self.name = network, tuple(taps), name
        self.found: dict[str, Tensor] = {}
        modules = dict(network.named_modules())
        for tap in self.taps:
            if tap not in modules or not tap:
                raise ConfigError(f"{name} has no module {tap!r} to tap", hint=did_you_mean(tap, set(modules) - {""}))
        self.hooks = [modules[tap].register_forward_hook(self._keep(tap)) for tap in self.taps]

    def _keep(self, tap: str) -> Any:
        def keep(module: nn.Module, given: Any, output: Any) -> None:
            del module, given
            self.found[tap] = output[0] if isinstance(output, (tuple, list)) else output  # recurrent layers give two

        return keep

    def __call__(self, x: Any) -> list[Tensor]:
        """The taps `(B, C_j, ...)` and the logits `(B, C)`."""
        several = outputs(self.network(x))
        if not self.taps:
            return several
        try:
            return [*(self.found[tap] for tap in self.taps), several[-1]]
        except KeyError as error:
            raise ConfigError(
                f"{self.name} does not run its module {error.args[0]!r}",
                hint="tap one that its forward pass goes through",
            ) from None
        finally:
            self.found.clear()  # or they would outlive their step

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self.hooks:
            hook.remove()

    def __enter__(self) -> Tapped:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def profile(tap: Tensor, how: Pooling = "average") -> Tensor:
    """`(B, P)` of `(B, C, ...)`: the mean (or largest) value over channels at each position.

    Channels are gone, so networks need not have equally many; the order of channels does not matter. A `(B, P)` tap is
    one channel.
    """
    if tap.dim() == 2:
        return tap
    values = tap.flatten(2)
    return values.mean(1) if how == "average" else values.amax(1)


def pooled(tap: Tensor, length: int, how: Pooling = "average") -> Tensor:
    """`(B, length)` of `(B, C, ...)`: the positions pooled adaptively, then the channels averaged (or the largest taken).

    Both steps are means (or both are maxima), so they are done in the other order, which is far less work.
    """
    values = profile(tap, how)
    if values.shape[1] == length:
        return values
    pool = F.adaptive_avg_pool1d if how == "average" else F.adaptive_max_pool1d
    found: Tensor = pool(values.unsqueeze(1), length)
    return found.squeeze(1)


def positions(tap: Tensor) -> int:
    """P, how many positions a tap has."""
    return tap.shape[1] if tap.dim() == 2 else tap[0, 0].numel()


def distances(student: Tensor, teacher: Tensor, kind: Similarity = "cross-entropy") -> Tensor:
    """S of each pair of vectors `(B, d)`: how far the student is from the teacher, `(B,)`.

    - `cross-entropy`: `-sum_i softmax(t)_i log softmax(s)_i`. Its least value is the teacher's entropy, see `entropies`.
    - `softmax-l1`, `softmax-l2`: the sum of absolute or squared differences of the softmaxes.
    - `l1`, `l2`: the mean of absolute or squared differences of the vectors themselves, whose length varies by tap.
    """
    match kind:
        case "cross-entropy":
            return student.logsumexp(-1) - (teacher.softmax(-1) * student).sum(-1)
        case "l1":
            return (student - teacher).abs().mean(-1)
        case "l2":
            return (student - teacher).square().mean(-1)
        case "softmax-l1":
            return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1)
        case "softmax-l2":
            return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)
    raise ConfigError(f"there is no similarity {kind!r}")


def similarity(student: Tensor, teacher: Tensor, kind: Similarity = "cross-entropy") -> Tensor:
    """The mean of `distances`."""
    return distances(student, teacher, kind).mean()


def entropies(teacher: Tensor) -> Tensor:
    """Entropy `(B,)` of `softmax(t)`: the floor of the cross-entropy, which makes curves of teachers comparable."""
    return teacher.logsumexp(-1) - (teacher.softmax(-1) * teacher).sum(-1)


@torch.no_grad()
def kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher | student) of the softmaxes `(B, C)`, mean over the batch: 0 where the student answers alike."""
    return (distances(student, teacher) - entropies(teacher)).mean()


def mixture(logits: Sequence[Tensor]) -> Tensor:
    """Logits `(B, C)` whose softmax is the mean of those of several networks; of one network, its own logits.

    The part of logits that a softmax does not see is the mean of the networks', so that they stay comparable as numbers.
    """
    if len(logits) == 1:
        return logits[0]
    each = torch.stack(list(logits))  # (K, B, C)
    mean = torch.logsumexp(each.log_softmax(-1), 0) - torch.tensor(float(len(logits))).log().to(each)
    return mean + torch.logsumexp(each, -1, keepdim=True).mean(0)


class Ensemble(nn.Module):
    """Networks that answer together: logits whose softmax is the mean of theirs.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if not networks:
            raise ConfigError("an ensemble of no networks gives no answer", hint="give at least one")
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Any) -> Tensor:
        """`(B, C)`."""
        return mixture([outputs(network(x))[-1] for network in self.networks])
