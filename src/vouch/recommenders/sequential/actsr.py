"""AC-TSR: attention whose weights are calibrated by spatial relations and by an attacker.

Source: Attention Calibration for Transformer-based Sequential Recommendation, arXiv 2308.09419. A spatial calibrator
damps pairs whose order and distance are not what their query and key suggest; an adversarial calibrator learns a mask
that hurts the prediction most and raises the weights that it destroys. Use it with any transformer here:
`attention="actsr"`.

What follows from the formulas, and is kept: the final weights are softmaxes of values between 0 and 1, so none can
exceed e / (e + n - 1) for n keys (the attention kind `double-softmax` is the control for that flattening); the mask
penalty draws the mask towards uniform; in a causal model the order term has no order in it. What differs: all prefixes
of a history are trained in one pass, so an epoch has far fewer steps and the default learning rate is 1e-3, not 1e-4;
logarithms of sigmoids are exact. In parallel, the adversarial calibrator works on the attention without the spatial one.
Shapes: `B` batch, `H` heads, `T` positions, `D` hidden size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import Choice, Config, setting
from vouch.errors import DataError
from vouch.nn.transformer import Context, ExplicitAttention, attend
from vouch.recommenders.sequential.base import NextItem, SequenceEncoder, SequentialRecommender
from vouch.recommenders.sequential.batches import SequenceBatch
from vouch.recommenders.sequential.parts import Attention, Setup, Term, part
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.registry import Card, register

ANNEALING_STEPS = 1e5


class CalibrationConfig(Config):
    """Settings of the calibrated attention and its attacker."""

    calibrators: Literal["both", "spatial", "adversarial", "none"] = setting("both", "which calibrators are on")
    order: bool = setting(True, "the order term of the spatial calibrator")
    distance: bool = setting(True, "the distance term of the spatial calibrator")
    combine: Literal["gate", "fixed", "annealing"] = setting("gate", "how origin and calibrated attention are joined")
    arrange: Literal["series", "parallel"] = setting("series", "the attacker sees the spatially calibrated attention")
    mask: Literal["learned", "uniform"] = setting("learned", "the attacker's mask; uniform is a control")
    penalty: float = setting(0.3, "weight of the mask penalty", ge=0, search=Choice((0.03, 0.3)))
    mask_penalty: Literal["tensor", "mean"] = setting(
        "tensor", "norm of the whole tensor, as published (it grows with the batch), or root of the mean"
    )

    @property
    def attacked(self) -> bool:
        """Whether there is an attacker to train."""
        return self.calibrators in ("both", "adversarial") and self.mask == "learned"


class CalibratedAttention(ExplicitAttention):
    """One layer of AC-TSR."""

    steps: Tensor

    def __init__(
        self, hidden_size: int, num_heads: int, dropout: float, max_length: int, settings: CalibrationConfig
    ) -> None:
        super().__init__(hidden_size, num_heads, dropout)
        self.settings = settings
        size = hidden_size // num_heads
        # w . [q ; k] = w_q . q + w_k . k: two outputs, for order and distance, shared by the heads
        self.spatial_query = nn.Linear(size, 2)
        self.spatial_key = nn.Linear(size, 2, bias=False)
        self.spread = nn.Parameter(torch.randn(()))
        self.attack_query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.attack_key = nn.Linear(hidden_size, hidden_size, bias=False)
        self.gate = nn.Linear(hidden_size, max_length)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def spatial_errors(self, q_BHTK: Tensor, k_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods `(B, H, T, T)` of each pair's order and distance; never above 0."""
        seen = self.spatial_query(q_BHTK).unsqueeze(-2) + self.spatial_key(k_BHTK).unsqueeze(-3)
        order, distance = seen.float().unbind(-1)
        place = torch.arange(q_BHTK.shape[-2], device=q_BHTK.device)
        gap = place - place.unsqueeze(1)  # j - i
        order = F.logsigmoid(torch.where(gap > 0, order, -order))
        distance = -(self.spread.square() / 2) * (torch.log1p(gap.abs().float()) - distance).square()
        return order, distance

    def weigh(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Origin attention, its calibration, and the attacked branch of the last layer in training.

        Raises:
            DataError: there are more positions than the gate has outputs.
        """
        settings, T = self.settings, q_BTD.shape[1]
        if self.gate.out_features < T:
            raise DataError(
                f"a history of {T} events for a gate of {self.gate.out_features}",
                hint="give the last max_length events, or train with a greater max_length",
            )
        q, k = self.heads(q_BTD), self.heads(k_BTD)
        scale = q.shape[-1] ** -0.5
        plain = (q @ k.transpose(-1, -2)).float()
        scores = plain
        if settings.calibrators in ("both", "spatial"):
            order, distance = self.spatial_errors(q, k)
            scores = scores + (order if settings.order else 0.0) + (distance if settings.distance else 0.0)
        origin = self.drop(attend(scores * scale, mask))
        if settings.calibrators in ("spatial", "none"):
            return origin, None
        parallel = settings.arrange == "parallel"
        base = self.drop(attend(plain * scale, mask)) if parallel else origin
        M = self.perturbation(q_BTD, k_BTD, mask, scale)
        if context.watch:
            context.note("origin", origin)
            context.note("mask", M)
        attacked = None
        if context.attack:
            context.note("penalty", self.penalty(M, mask))
            if context.last_layer:
                noise = torch.randn_like(base)
                attacked = attend(base * M + noise * (1 - M), mask)
        calibrated = attend(base * torch.exp(1 - M), mask)
        return attend(self.join(origin, calibrated, q_BTD), mask), attacked

    def perturbation(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, scale: float) -> Tensor:
        """The attacker's mask M `(B, H, T, T)`; rows sum to 1."""
        if self.settings.mask == "uniform":
            shape = (len(q_BTD), self.num_heads, q_BTD.shape[1], q_BTD.shape[1])
            return attend(torch.zeros(shape, device=q_BTD.device), mask)
        q, k = self.heads(self.attack_query(q_BTD)), self.heads(self.attack_key(k_BTD))
        return self.drop(attend((q @ k.transpose(-1, -2)).float() * scale, mask))

    def penalty(self, M: Tensor, mask: Tensor) -> Tensor:
        """`||1 - M||`: of the whole tensor, or the root of the mean over the pairs that may be seen."""
        if self.settings.mask_penalty == "tensor":
            return torch.linalg.vector_norm(1 - M)
        seen = mask.expand_as(M)
        return ((1 - M).square() * seen).sum().div(seen.sum()).sqrt()

    def join(self, origin: Tensor, calibrated: Tensor, q_BTD: Tensor) -> Tensor:
        """What the last softmax is taken of."""
        if self.settings.combine == "fixed":
            return origin + 0.5 * calibrated
        if self.settings.combine == "annealing":
            if self.training:
                self.steps += 1
            return torch.exp(-self.steps / ANNEALING_STEPS) * origin + calibrated
        g = torch.sigmoid(self.gate(q_BTD).float())[:, None, :, : origin.shape[-1]]  # (B, 1, T, T), for all heads
        return g * origin + (1 - g) * calibrated


@part("attention", "actsr", "attention calibrated by spatial relations and by an attacker")
class Calibrated(Attention):
    """The attention kind of AC-TSR. Its distance term is the only positional signal."""

    Config = CalibrationConfig
    brings = ("actsr",)
    positions = False

    def __init__(self, config: Any, settings: CalibrationConfig, facts: dict[str, Tensor]) -> None:
        super().__init__(config, settings, facts)
        self.shape = (config.hidden_size, config.num_heads, config.dropout, config.max_length, settings)

    def layer(self) -> CalibratedAttention:
        """One block's calibrated attention."""
        return CalibratedAttention(*self.shape)


class Twice(ExplicitAttention):
    """Plain attention with a second softmax."""

    def weigh(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """The flattening that calibration brings, without the calibration."""
        return attend(super().weigh(q_BTD, k_BTD, mask, context)[0], mask), None


class Mean(ExplicitAttention):
    """The mean of all values that may be seen."""

    def weigh(self, q_BTD: Tensor, k_BTD: Tensor, mask: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        """Uniform weights."""
        scores = torch.zeros(len(q_BTD), self.num_heads, *q_BTD.shape[1:2] * 2, device=q_BTD.device)
        return self.drop(attend(scores, mask)), None


class _Control(Attention):
    kind_of_layer: type[ExplicitAttention]

    def __init__(self, config: Any, settings: Any, facts: dict[str, Tensor]) -> None:
        super().__init__(config, settings, facts)
        self.shape = (config.hidden_size, config.num_heads, config.dropout)

    def layer(self) -> ExplicitAttention:
        """One block's attention."""
        return self.kind_of_layer(*self.shape)


@part("attention", "double-softmax", "plain attention with a second softmax, the control for AC-TSR")
class DoubleSoftmax(_Control):
    """Softmax applied twice: what AC-TSR flattens, without what it calibrates."""

    kind_of_layer = Twice


@part("attention", "mean", "the mean of the history at every position, a control for attention as such")
class MeanPooling(_Control):
    """Uniform attention."""

    kind_of_layer = Mean


@part("objective", "actsr", "trains the attacker of the calibrated attention")
class Attack(Term):
    """`L_att`: less of the next item's loss in the attacked branch, and the mask penalty. Trains the attacker only."""

    Config = CalibrationConfig

    @classmethod
    def refuses(cls, recommender: SequentialRecommender) -> str | None:
        """Without the attention there is nothing to attack."""
        return None if recommender.config.attention == "actsr" else "it needs attention=actsr"

    def __init__(self, settings: CalibrationConfig, setup: Setup) -> None:
        super().__init__(settings, setup)
        self.next = NextItem(None, setup)
        self.last: tuple[SequenceEncoder, SequenceBatch] | None = None  # a tuple, so that it is no module of its own
        layers = [layer for layer in setup.encoder.modules() if isinstance(layer, CalibratedAttention)]
        self.theirs: list[nn.Parameter] = []
        for layer in layers:
            self.theirs += [*layer.attack_query.parameters(), *layer.attack_key.parameters()]

    def active(self) -> bool:
        """Only with an attacker."""
        return bool(self.settings.attacked)

    def attacks(self) -> tuple[str, list[nn.Parameter]]:
        """The attack moves the projections of the mask and nothing else, and nothing else moves them."""
        return "attack", self.theirs

    def forward(
        self, encoder: SequenceEncoder, hidden_BTD: Tensor, batch: SequenceBatch, context: Context
    ) -> dict[str, Tensor]:
        """`{"attack": ...}`."""
        assert context.second is not None
        self.last = encoder, batch
        broken = self.next(encoder, context.second, batch, context)["next"]
        penalty = torch.stack(context.notes["penalty"]).mean()
        return {"attack": self.settings.penalty * penalty - broken}

    @torch.no_grad()
    def diagnose(self) -> dict[str, float]:
        """How even the attacker's masks are, on the last batch: 1 where they are uniform and tell nothing apart."""
        if self.last is None:
            return {}
        encoder, batch = self.last
        context = Context(user=batch.user, watch=True)
        encoder(batch.items, batch.lengths, context)
        seen = evenness(torch.cat(context.notes["mask"]), (batch.items != -1).repeat(len(context.notes["mask"]), 1))
        return {"actsr.mask_evenness": float(seen.mean())} if len(seen) else {}


def evenness(weights_BHTT: Tensor, real_BT: Tensor) -> Tensor:
    """Entropy of each row of weights by that of equal ones `(n,)`; of real queries that see two keys or more."""
    rows = weights_BHTT.transpose(1, 2)[real_BT].flatten(0, 1)  # (n, T)
    keys = (rows > 0).sum(-1)
    rows, keys = rows[keys > 1], keys[keys > 1]
    return torch.special.entr(rows).sum(-1) / keys.float().log()


class ACTSRConfig(SASRecConfig):
    """Settings of AC-TSR on SASRec: the paper's for Beauty, with its learning rate and epochs as said above."""

    attention: str = setting("actsr", "attention kind of the transformer")
    parts: dict[str, dict[str, Any]] = setting({"actsr": {"penalty": 0.03}}, "settings of the parts")
    num_layers: int = setting(3, "transformer blocks", ge=1, search=Choice((2, 3)))
    num_heads: int = setting(4, "attention heads; divides hidden_size", ge=1)
    inner_size: int = setting(128, "size of the feed-forward layers; 0 is 4 x hidden_size", ge=0)
    batch_size: int = setting(256, "histories of one batch", ge=1)


@register(
    Card(
        slug="actsr",
        name="AC-TSR",
        area="recommenders/sequential",
        summary="a transformer whose attention is calibrated by spatial relations and by an attacker",
        paper="2308.09419",
        year=2023,
    )
)
class ACTSR(SASRec):
    """SASRec with calibrated attention."""

    Config = ACTSRConfig
