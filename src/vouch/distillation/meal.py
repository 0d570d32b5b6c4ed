"""MEAL: several trained networks distilled into one, by block-wise similarity and discriminators.

Sources: MEAL: Multi-Model Ensemble via Adversarial Learning, arXiv 1812.02425; its extension to noisy labels, arXiv
1908.08520; MEAL V2, arXiv 2009.08453 (`teacher="mean"`). In each step one teacher is drawn; outputs of the student at
several depths are pulled toward the teacher's, pooled to common lengths (`taps`), while discriminators try to tell the
two apart (`adversary`). Labels have no part in it, so noisy ones do no harm beyond what they did to the teachers.

What differs, and why:
- The paper describes a game, and so does `adversary="grl"`, the default; the released training has none: there the
  student is rewarded for being distinguishable (`adversary="cooperative"`), and its ensemble command compares the
  logits only (no taps here).
- The weights `eta` act on the gradient that reaches the student. Discriminators learn at full strength throughout,
  also while `ramp` lets the weights grow from 0, so that they can judge when they begin to count.
- `eta` is 0.1 for every output, logits too, where the paper has 1.
- Discriminators do not end in a ReLU, teachers run in evaluation mode, and the epoch is chosen on validation data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vouch.config import Span, setting
from vouch.distillation.adversary import SIGN, Adversary, Judges
from vouch.distillation.sgd import (
    SGDConfig,
    Validate,
    as_batches,
    check_batch,
    factor,
    label_loss,
    labels_of,
    parts_of,
    sgd,
)
from vouch.distillation.taps import Pooling, Similarity, Tapped, kl, mixture, pooled, positions, similarity
from vouch.errors import ConfigError, TrainingError
from vouch.training import FitReport, Run, fit, seeded
from vouch.training.loop import Batches

CHOOSING = 71
"""Sets the draws of teachers apart from the other draws of a run."""


class DistilConfig(SGDConfig):
    """Settings of distillation. Lists hold one value for each tap and one for the logits, or one for all."""

    similarity: Similarity = setting("cross-entropy", "how the student's outputs are pulled toward the teacher's")
    gamma: tuple[float, ...] = setting((1.0,), "weights of the similarities, taps first, logits last")
    pool: Pooling = setting("average", "how positions become a common length, and channels one")
    adversary: Adversary = setting("grl", "what the student learns from the discriminators; none has none")
    eta: tuple[float, ...] = setting((0.1,), "weights of what the discriminators teach the student")
    ramp: float = setting(1 / 3, "share of all steps in which eta grows from 0", ge=0, le=1)
    discriminator_rate: float = setting(1e-3, "step size of the discriminators at its largest", gt=0)
    teacher: Literal["random", "mean"] = setting("random", "one teacher drawn for each batch, or the mean of all")
    label_weight: float = setting(0.0, "share of the cross-entropy of the labels", ge=0, le=1, search=Span(0.0, 0.9))


@dataclass(frozen=True)
class DistilReport(FitReport):
    """What came of a distillation.

    Attributes:
        lengths: the common length of each tap, and the number of classes.
        drawn: how many steps each teacher taught.
    """

    lengths: tuple[int, ...] = ()
    drawn: tuple[int, ...] = ()


class Distilled(NamedTuple):
    """The trained student, which stands alone, and the report."""

    student: nn.Module
    report: DistilReport


def distil(
    student: nn.Module,
    teachers: Sequence[nn.Module],
    batches: Batches | Iterable[Any],
    *,
    taps: Sequence[str] = (),
    teacher_taps: Sequence[Sequence[str]] | None = None,
    lengths: Sequence[int] | None = None,
    validate: Validate | None = None,
    config: DistilConfig | None = None,
    run: Run | None = None,
    **settings: Any,
) -> Distilled:
    """Train `student` in place from `teachers`, which are left as they were, to the bit.

    A network gives logits `(B, C)`, or a list of tap outputs and, last, logits. With `taps`, the outputs of the named
    modules are tapped. A tap is `(B, channels, ...)` or `(B, values)`. Discriminators are dropped at the end.

    Args:
        batches: of inputs or `(input, label)`; labels are read only where `label_weight` is above 0. Batches of `fit`,
            a list, or a `DataLoader`.
        taps: names of the student's modules, shallow first. teacher_taps: those of each teacher, the same by default.
        lengths: the common length of each tap; by default the number of positions that the student's has.
        validate: gives metrics of the student; the best epoch by `config.monitor` is kept. Without, the last.
        settings: those of `DistilConfig`, in place of `config`.

    Raises:
        ConfigError: there is no teacher or no batch, networks differ in their taps or classes, a module or weight is
            missing, a network cannot read the batches, or labels that are read do not fit.
        TrainingError: a teacher or a loss gave what is not a number, a batch is empty, or one of one met a batch norm.
    """
    config, run, source = config or DistilConfig(**settings), run or Run(), as_batches(batches)
    if not teachers:
        raise ConfigError("there is no teacher", hint="give at least one trained network")
    ours = {id(parameter) for parameter in student.parameters()}
    for k, teacher in enumerate(teachers, start=1):
        if teacher is student or any(id(parameter) in ours for parameter in teacher.parameters()):
            raise ConfigError(f"the student has weights of teacher {k}", hint="copy it first: copy.deepcopy(teacher)")
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise ConfigError("the student has no parameter that is trained", hint="student.requires_grad_(True)")
    if teacher_taps is not None and len(teacher_taps) != len(teachers):
        raise ConfigError(f"there are {len(teachers)} teachers, and taps for {len(teacher_taps)}")
    with ExitStack() as stack:
        stack.enter_context(left_alone(teachers))
        tapped = stack.enter_context(Tapped(student, taps, "the student"))
        theirs = [
            stack.enter_context(Tapped(teacher, taps if teacher_taps is None else teacher_taps[k], f"teacher {k + 1}"))
            for k, teacher in enumerate(teachers)
        ]
        with seeded(run.seed):
            sizes = common_lengths(tapped, theirs, source, lengths)
        players = _Players(tapped, theirs, sizes, config, len(source), run.seed)
        groups: list[dict[str, Any]] = [{"params": list(student.parameters())}]
        if len(players.judges):
            groups.append({"params": list(players.judges.parameters()), "lr": config.discriminator_rate})
        try:
            report = fit(
                players,
                source,
                config=config,
                run=run,
                optimizer=sgd(groups, config),
                step=players.step,
                schedule=factor(config.schedule, config.epochs * len(source)),
                validate=None if validate is None else lambda: validate(student),
            )
        except TrainingError:
            players.blame()
            raise
        players.blame()
    student.eval()
    plain = {field.name: getattr(report, field.name) for field in fields(report)}
    drawn = players.drawn(report.epochs)
    return Distilled(student, DistilReport(**plain, lengths=tuple(sizes), drawn=drawn))


@contextmanager
def left_alone(teachers: Sequence[nn.Module]) -> Iterator[None]:
    """Teachers in evaluation mode inside the block; their modes and devices as they were afterwards."""
    modes = [{module: module.training for module in teacher.modules()} for teacher in teachers]
    devices = [next((p.device for p in teacher.parameters()), None) for teacher in teachers]
    try:
        for teacher in teachers:
            teacher.eval()
        yield
    finally:
        for teacher, before, device in zip(teachers, modes, devices, strict=True):
            for module, training in before.items():
                module.training = training
            if device is not None:
                teacher.to(device)


def common_lengths(
    student: Tapped, teachers: Sequence[Tapped], source: Batches, lengths: Sequence[int] | None
) -> list[int]:
    """The common length of each tap and the number of classes, found by reading one batch.

    Raises:
        ConfigError: networks differ in taps or classes, know a single one, cannot read the batch, or `lengths` are not
            one for each tap.
    """
    x, _ = parts_of(next(iter(source.epoch(np.random.default_rng(0), 0, 1))))
    ours, *theirs = (_probe(network, x) for network in (student, *teachers))
    for teacher, found in zip(teachers, theirs, strict=True):
        if len(found) != len(ours):
            raise ConfigError(
                f"the student has {len(ours) - 1} taps and {teacher.name} has {len(found) - 1}",
                hint="name as many modules of each, in teacher_taps",
            )
        if found[-1].shape[1] != ours[-1].shape[1]:
            raise ConfigError(
                f"{teacher.name} knows {found[-1].shape[1]} classes and the student {ours[-1].shape[1]}",
                hint="all must have been trained on the same classes",
            )
    if ours[-1].shape[1] < 2:
        raise ConfigError(
            "the networks know a single class, so their softmax says nothing",
            hint="give networks with an output for each class; two for yes and no",
        )
    sizes = [positions(tap) for tap in ours[:-1]] if lengths is None else list(lengths)
    if len(sizes) != len(ours) - 1 or any(size < 1 for size in sizes):
        raise ConfigError(
            f"lengths are {sizes} for {len(ours) - 1} taps", hint="give a length of 1 or more for each tap"
        )
    for name, found in zip(("the student", *(t.name for t in teachers)), (ours, *theirs), strict=True):
        for j, (tap, size) in enumerate(zip(found, sizes, strict=False), start=1):
            if positions(tap) < size:
                warnings.warn(f"tap {j} of {name} has {positions(tap)} positions, repeated to {size}", stacklevel=4)
    return [*sizes, ours[-1].shape[1]]


@torch.no_grad()
def _probe(network: Tapped, x: Any) -> list[Tensor]:
    """What a network gives for a batch, in evaluation mode, so that nothing in it changes."""
    from vouch.training.devices import to_device

    modes = {module: module.training for module in network.network.modules()}
    device = next((p.device for p in network.network.parameters()), torch.device("cpu"))
    network.network.eval()
    try:
        found = network(to_device(x, device))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shape = f"inputs of the shape {tuple(x.shape)}" if isinstance(x, Tensor) else "the inputs"
        raise ConfigError(
            f"{network.name} cannot read {shape}: {error}", hint="all networks read the same inputs"
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training
    if not all(isinstance(each, Tensor) and each.dim() >= 2 for each in found) or found[-1].dim() != 2:
        shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in found]
        raise ConfigError(
            f"{network.name} gives {shapes}", hint="taps are (B, channels, ...), logits come last, (B, C)"
        )
    return found


def spread(values: Sequence[float], n: int, name: str) -> list[float]:
    """One value for each of `n` outputs.

    Raises:
        ConfigError: there are neither 1 nor `n`.
    """
    if len(values) not in (1, n):
        raise ConfigError(f"{name} has {len(values)} values for {n - 1} taps and the logits", hint=f"give 1 or {n}")
    return list(values) * n if len(values) == 1 else list(values)


class _Players(nn.Module):
    """Student and discriminators, which are trained; the teachers are kept where no optimizer or checkpoint sees them."""

    def __init__(
        self,
        student: Tapped,
        teachers: Sequence[Tapped],
        sizes: list[int],
        config: DistilConfig,
        per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.tapped, self.theirs, self.sizes, self.config = student, list(teachers), sizes, config
        self.per_epoch, self.seed = per_epoch, seed
        self.gamma = spread(config.gamma, len(sizes), "gamma")
        self.eta = spread(config.eta, len(sizes), "eta")
        self.student = student.network
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.judges = Judges(sizes if config.adversary != "none" else [])
        self.number, self.moved = 0, False
        self.chosen = np.zeros(0, np.int64)
        self.bad: list[Tensor] | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Draw the teachers of its steps."""
        self.number, self.chosen = (epoch - 1) * self.per_epoch, self.choices(epoch)

    def choices(self, epoch: int) -> Any:
        """The number of the teacher of each step, int64 `(steps,)`; nothing else has a part in the draw but the seed."""
        return np.random.default_rng([self.seed, CHOOSING, epoch]).integers(0, len(self.theirs), self.per_epoch)

    def drawn(self, epochs: int) -> tuple[int, ...]:
        """How many steps each teacher taught."""
        if self.config.teacher == "mean":
            return (epochs * self.per_epoch,) * len(self.theirs)
        steps = np.concatenate([self.choices(epoch) for epoch in range(1, epochs + 1)])
        return tuple(np.bincount(steps, minlength=len(self.theirs)).tolist())

    def vectors(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Pooled taps `(B, d_j)` and the logits `(B, C)`."""
        taps = [pooled(tap, size, self.config.pool) for tap, size in zip(outputs[:-1], self.sizes, strict=False)]
        return [each.float() for each in (*taps, outputs[-1])]

    @torch.no_grad()
    def target(self, x: Any, step: int) -> list[Tensor]:
        """What this step's teacher, or the mean of all, gives."""
        asked = range(len(self.theirs)) if self.config.teacher == "mean" else [int(self.chosen[step % self.per_epoch])]
        found = []
        for k in asked:
            given = self.vectors(self.theirs[k](x))
            # read at the end: asking here would wait for the device
            broken = torch.stack([~torch.isfinite(each).all() for each in given]).any()
            if self.bad is None:
                self.bad = [torch.zeros_like(broken) for _ in self.theirs]
            self.bad[k] = self.bad[k] | broken
            found.append(given)
        if len(found) == 1:
            return found[0]
        *taps, logits = zip(*found, strict=True)
        return [*(torch.stack(tap).mean(0) for tap in taps), mixture(logits)]

    def blame(self) -> None:
        """Name a teacher that gave what is not a number.

        Raises:
            TrainingError: there is one.
        """
        for teacher, bad in zip(self.theirs, self.bad or (), strict=False):
            if bool(bad):
                raise TrainingError(
                    f"{teacher.name} ({type(teacher.network).__name__}) gave a value that is not a finite number",
                    hint="leave it out, or train it again",
                )

    def step(self, model: Any, batch: Any, optimizer: torch.optim.Optimizer, fabric: Any) -> dict[str, Tensor]:
        """One step of the student and one of the discriminators."""
        config, (x, _) = self.config, parts_of(batch)
        label = labels_of(batch) if config.label_weight else None
        del model
        check_batch(self.student, x)
        if not self.moved:
            for teacher in self.theirs:
                teacher.network.to(fabric.device)
            self.moved = True
        with fabric.autocast():
            target = self.target(x, self.number)
            ours = self.vectors(self.tapped(x))
        steps = config.ramp * config.epochs * self.per_epoch
        grown = min(1.0, self.number / steps) if steps else 1.0
        self.number += 1
        near = [similarity(s, t, config.similarity) for s, t in zip(ours, target, strict=True)]
        total = torch.stack([weight * each for weight, each in zip(self.gamma, near, strict=True)]).sum()
        logged = {"similarity": total.detach(), "kl": kl(ours[-1], target[-1])}
        if label is not None:
            labels = label_loss(ours[-1], label)
            total = (1 - config.label_weight) * total + config.label_weight * labels
            logged["labels"] = labels.detach()
        if config.adversary in SIGN:
            weights = [SIGN[config.adversary] * grown * weight for weight in self.eta]
            told = torch.stack(self.judges.losses(ours, target, weights))
            total, logged["discriminator"] = total + told.sum(), told.detach().mean()
        elif config.adversary == "alternating":
            told = torch.stack(self.judges.losses(ours, target))
            optimizer.zero_grad()
            fabric.backward(told.sum())
            optimizer.step()
            weights = [grown * weight for weight in self.eta]
            lies = [weight * each for weight, each in zip(weights, self.judges.deceived(ours), strict=True)]
            total, logged["discriminator"] = total + torch.stack(lies).sum(), told.detach().mean()
        optimizer.zero_grad()
        fabric.backward(total)
        if config.max_grad_norm:
            nn.utils.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
        optimizer.step()
        return {**logged, "loss": total}
