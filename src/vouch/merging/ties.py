"""TIES merging: small changes are cut, the sign of each weight is voted on, and only those that agree are added.

Source: TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708. On the task vectors as one long
vector each, of `d` entries:

1. trim: entries below the `(d - floor(keep d))`-th smallest magnitude become 0 (that entry and its equals stay);
2. elect: the sign of each entry is that of the sum over models; where that sum is 0 it is the sign that most entries of
   the whole vector were given, as in the authors' code;
3. merge: of the entries that have the elected sign the sum, or the mean over those that are not 0;

and the base plus `weight` times that. The long vectors are never laid out: the threshold is found exactly by counting
magnitudes by their leading 16 bits, then those that share these by the next 16, and so on (floating point numbers that
are not negative are in the order of their bits). Files are thus read four times, and never held.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor

from vouch.errors import ConfigError
from vouch.merging.arithmetic import weights_of
from vouch.merging.states import Family, Models, Options, required
from vouch.merging.stored import Source, State

BITS = 16
"""Told apart in one reading."""


def ties(
    base: Source,
    models: Models,
    weight: float | None = None,
    *,
    keep: float = 0.2,
    merge: Literal["sum", "mean"] = "sum",
    **options: Unpack[Options],
) -> State:
    """The base plus `weight` times what the models' trimmed task vectors agree on.

    Args:
        base: what the models were fine-tuned from. models: states, networks or files, in a list or by name.
        weight: 0.3 with `sum` and 1 with `mean`, unless given; best chosen on labelled validation data.
        keep: share of the entries of each task vector that are kept.
        merge: the sum of the entries that agree, or their mean.
        options: `out`, `exclude`, `max_distance`; see `Options`.

    Raises:
        DataError: the models differ, have values that are not finite, or do not descend from the base.
        StorageError: a file cannot be read or written. ConfigError: `keep` or `merge` is out of range, or there is no base.
    """
    if merge not in ("sum", "mean"):
        raise ConfigError(f"merge is {merge!r}", hint="use 'sum' or 'mean'")
    by = float(weights_of({"sum": 0.3, "mean": 1.0}[merge] if weight is None else weight, ["all"])[0])
    trimmed = Trimmed(Family(models, required(base), **options), keep)

    def recipe(name: str, base: Tensor | None, models_K: Tensor) -> Tensor:
        assert base is not None
        agreed_K = trimmed.agreed(models_K - base)
        total = agreed_K.sum(0)
        if merge == "mean":
            total = total / (agreed_K != 0).sum(0).clamp(min=1)
        return base + by * total

    return trimmed.family.merge(recipe, "ties", weight=by, keep=keep, merge=merge)


class Trimmed:
    """The task vectors of a family after trimming and voting: entries are 0 or the task vector's, and agree in sign.

    Attributes:
        threshold_K: least magnitude kept of each model. majority: -1, 0 or 1, for entries without a vote.
    """

    def __init__(self, family: Family, keep: float) -> None:
        """Find the thresholds and the majority, in three readings.

        Raises:
            ConfigError: `keep` does not lie in (0, 1].
        """
        if not 0 < keep <= 1:
            raise ConfigError(f"keep is {keep}; it must be above 0 and at most 1")
        self.family = family
        size = sum(torch.Size(family.layout[name][1]).numel() for name in family.parameters)
        self.threshold_K = kth_magnitude(family, max(1, size - int(keep * size)))
        votes = [int(self._signs(self._trim(family.vectors(name))).long().sum()) for name in family.parameters]
        self.majority = (sum(votes) > 0) - (sum(votes) < 0)

    def agreed(self, tau_K: Tensor) -> Tensor:
        """The entries of one tensor's task vectors `(K, ...)` that are large enough and have the elected sign."""
        kept_K = self._trim(tau_K)
        sign = self._signs(kept_K)
        sign = torch.where(sign == 0, self.majority, sign)
        return torch.where(torch.sign(kept_K) == sign, kept_K, 0.0)

    def _trim(self, tau_K: Tensor) -> Tensor:
        threshold_K = self.threshold_K.to(tau_K.device).view(-1, *[1] * (tau_K.ndim - 1))
        return torch.where(tau_K.abs() >= threshold_K, tau_K, 0.0)

    @staticmethod
    def _signs(kept_K: Tensor) -> Tensor:
        return torch.sign(kept_K.sum(0))


def kth_magnitude(family: Family, k: int) -> Tensor:
    """The `k`-th smallest magnitude (from 1) of each model's whole task vector `(K,)`, exactly, by counting."""
    wide = any(family.layout[name][0] == torch.float64 for name in family.parameters)
    dtype, integer, width = (torch.float64, torch.int64, 64) if wide else (torch.float32, torch.int32, 32)
    models = len(family.models)
    rank = torch.full((models,), k, dtype=torch.int64)  # among those that share the bits found so far
    found = torch.zeros(models, dtype=torch.int64)
    for shift in range(width - BITS, -1, -BITS):
        counts = torch.zeros(models, 1 << BITS, dtype=torch.int64)
        for name in family.parameters:
            for model, tau in enumerate(family.vectors(name).to(dtype)):
                bits = tau.abs().flatten().view(integer)
                if shift + BITS < width:
                    bits = bits[(bits >> (shift + BITS)) == found[model].to(bits)]
                low = (bits >> shift) & ((1 << BITS) - 1)
                counts[model] += torch.bincount(low, minlength=1 << BITS).cpu()
        below = counts.cumsum(1)
        place = torch.searchsorted(below, rank[:, None]).squeeze(1)
        rank = rank - torch.where(place > 0, below.gather(1, (place - 1).clamp(min=0)[:, None]).squeeze(1), 0)
        found = (found << BITS) | place
    return found.to(integer).view(dtype)
