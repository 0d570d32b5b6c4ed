"""Representation Surgery: a small correction for each task brings a merged network's features back to its expert's.

Source: Representation Surgery for Multi-Task Model Merging, arXiv 2402.02705. The features `z` of a merged network
differ in a systematic way from the features `z_k` that the individual network of task `k` gives, so that the head of
that task misreads them. For each task the difference is predicted from `z` through `r` numbers, and taken off:

    z_hat = z - U_k relu(V_k z),    min over U_k, V_k of mean |z_hat - z_k|    (V_k (r, D), U_k (D, r))

No labels are needed, but inputs of each task and its individual network are: this is distillation on unlabelled data.
`U` begins at 0, so that nothing changes before the first step. How the network was merged is of no matter, nor what it
is: it is only called. With `layers`, outputs inside the network are corrected too, one after the other in the order
they are computed, each on what the corrected ones before it give (Surgery V2, arXiv 2410.14389).

What differs from the released code, and why:

- features do not change while corrections are trained, so they are computed once, not for every batch;
- tasks do not share anything, so each is trained by an optimizer of its own: the same updates as one optimizer for all
  that leaves alone what has no gradient;
- a unit of `relu(V z)` that is silent on all inputs would never learn: its row of `V` is drawn from a symmetric
  distribution and is mirrored.

Shapes: `B` inputs, `D` features, `r` rank. Features are corrected before a head normalises them.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.config import Choice, Config, Span, setting
from vouch.errors import ConfigError, DataError, StorageError, TrainingError, UnknownIdError, did_you_mean
from vouch.files import atomic_file
from vouch.merging.positions import OUTPUT, Individual, Pair, Pairs, in_order, look
from vouch.merging.states import by_model
from vouch.merging.stored import Source, State
from vouch.merging.unlabelled import Inputs, evaluating, generator_of, once, place_of

FORMAT = "vouch surgery 1"
DISTANCES = {"l1": F.l1_loss, "l2": F.mse_loss, "smooth_l1": F.smooth_l1_loss}


class SurgeryConfig(Config):
    """Settings of the corrections and of their training; defaults are the paper's."""

    rank: int = setting(16, "numbers a difference is predicted through; 0: none", ge=0, search=Choice((4, 16, 64)))
    activation: Literal["relu", "gelu"] = setting("relu", "of these numbers; relu is the paper's")
    distance: Literal["l1", "l2", "smooth_l1"] = setting("l1", "what is minimised, a mean over inputs and features")
    learning_rate: float = setting(1e-3, "of Adam", gt=0, search=Span(1e-4, 1e-2, log=True))
    steps: int = setting(1000, "updates for each task (and layer)", ge=0)
    passes: int | None = setting(
        None, "times that every input is used, in place of `steps`; 1 with batches of 1: online"
    )
    batch_size: int = setting(16, "inputs of an update; all of them where there are fewer", ge=1)
    axis: int = setting(-1, "of a layer's output that holds the features; 1 for convolutions")
    cache: bool = setting(True, "compute all features once; otherwise again for each batch, with less memory")


class Correction(nn.Module):
    """`z - U act(V z)` along one axis; `2 D r` parameters, and no change at all while `U` is 0."""

    def __init__(
        self,
        features: int,
        rank: int = 16,
        *,
        activation: str = "relu",
        axis: int = -1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.activation = axis, activation
        self.down = nn.Parameter(torch.empty(rank, features))  # V
        self.up = nn.Parameter(torch.zeros(features, rank))  # U
        if rank:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5), generator=generator)

    def units(self, z: Tensor) -> Tensor:
        """`act(V z)` `(..., r)`."""
        h = F.linear(z.movedim(self.axis, -1).to(self.down.dtype), self.down)
        return F.relu(h) if self.activation == "relu" else F.gelu(h)

    def forward(self, z: Tensor) -> Tensor:
        """Corrected features, of the shape and type of `z`.

        Raises:
            DataError: `z` has another number of features than the correction was made for.
        """
        if z.shape[self.axis] != self.down.shape[1]:
            raise DataError(
                f"the features have {z.shape[self.axis]} dimensions, the correction was made for {self.down.shape[1]}",
                hint="use the network that the correction was trained on",
            )
        if not len(self.down):
            return z
        return z - F.linear(self.units(z), self.up).movedim(-1, self.axis).to(z.dtype)


@dataclass(frozen=True, eq=False)
class Bias:
    """How far merged features are from the individual network's, at one position for one task.

    Attributes:
        before, after: mean over inputs of `|z_k - z|` `(D,)`, without and with the correction.
        scale: mean of `|z_k|`; only shares of it compare between networks.
        inputs: how many. silent: units that no input makes fire.
    """

    before: Tensor
    after: Tensor
    scale: float
    inputs: int
    silent: int


@dataclass(frozen=True, eq=False)
class SurgeryReport:
    """What training gave: by task and position (`""` is the output) the bias on the inputs, and the loss of each step."""

    bias: dict[str, dict[str, Bias]]
    losses: dict[str, dict[str, Tensor]]
    parameters: dict[str, int]
    seconds: float


class Surgery(nn.Module):
    """A merged network with a correction for each task: `surgery(x, "task")` gives that task's features.

    The network itself is never changed. Where layers are corrected, it must not be called from several threads at once.
    """

    Config = SurgeryConfig

    def __init__(self, encoder: nn.Module, *, layers: Sequence[str] = (), **settings: Any) -> None:
        """Take the merged network, which gives features `(B, D)`, and the names of layers to correct as well.

        Raises:
            ConfigError: a setting does not fit, or the network has no such layer.
        """
        super().__init__()
        self.encoder, self.config = encoder, self.Config(**settings)
        known = [name for name, _ in encoder.named_modules() if name]
        for name in layers:
            if name not in known:
                raise ConfigError(f"the network has no layer {name!r}", hint=did_you_mean(name, known))
        self.positions = [*dict.fromkeys(layers), OUTPUT]
        self.tasks: list[str] = []
        self.corrections = nn.ModuleList()  # a list for each task, in the order of `positions`

    def forward(self, x: Any, task: str) -> Tensor:
        """Corrected features of one task's inputs, the network in evaluation mode.

        Raises:
            UnknownIdError: there is no correction for the task. DataError: the features do not fit it.
        """
        corrections = self._of(task)
        with evaluating(self.encoder):
            z = look(self.encoder, self.encoder, x, OUTPUT, corrections, task)
        corrected: Tensor = corrections[OUTPUT](z)
        return corrected

    def correct(self, z: Tensor, task: str) -> Tensor:
        """Corrected features, from features of the merged network: one forward pass serves all tasks.

        Raises:
            UnknownIdError: there is no correction for the task. ConfigError: layers inside the network are corrected.
        """
        if len(self.positions) > 1:
            raise ConfigError("layers are corrected as well, so features alone do not do", hint="call surgery(x, task)")
        corrected: Tensor = self._of(task)[OUTPUT](z)
        return corrected

    def fit(
        self,
        individual: Mapping[str, nn.Module | Source] | Sequence[nn.Module | Source],
        inputs: Mapping[str, Inputs] | Sequence[Inputs],
        *,
        seed: int = 0,
        on_step: Callable[[str, int, Correction], None] | None = None,
    ) -> SurgeryReport:
        """Train the corrections of some tasks; those of others, and the network, stay as they are.

        Args:
            individual: for each task its own network, or a state or file of one like the merged network.
            inputs: of each task, without labels (labels are not looked at); see `Inputs`.
            on_step: called after each update of a task's last correction, with the number of updates so far.

        Raises:
            ConfigError: tasks without inputs, or networks that do not give features.
            DataError: no inputs, features that are not finite, or of another size than the individual network's.
            TrainingError: the loss is not a finite number.
        """
        named = individual if isinstance(individual, Mapping) else {f"task {k}": x for k, x in enumerate(individual)}
        given: dict[str, Any] = by_model(inputs, list(named), "inputs")
        begin, report = time.perf_counter(), SurgeryReport({}, {}, {}, 0.0)
        made: dict[str, nn.ModuleList] = {}
        with torch.no_grad():
            for task, source in named.items():
                teacher = Individual(task, source, self.encoder)
                with evaluating(self.encoder, teacher.module):
                    if not self.tasks and not made and len(self.positions) > 1:
                        first = next(once(task, given[task], 2))
                        self.positions = [*in_order(self.encoder, self.positions[:-1], first), OUTPUT]
                    trained = self._fit_task(task, teacher, given[task], seed, on_step, report)
                made[task] = nn.ModuleList(trained.values())
        for task, trained_list in made.items():
            if task in self.tasks:
                self.corrections[self.tasks.index(task)] = trained_list
            else:
                self.tasks.append(task)
                self.corrections.append(trained_list)
        return replace(report, seconds=round(time.perf_counter() - begin, 3))

    @torch.no_grad()
    def bias(self, task: str, individual: nn.Module | Source, inputs: Inputs) -> dict[str, Bias]:
        """The bias of one task on other inputs, at each position; before each correction those before it count.

        Raises:
            UnknownIdError: there is no correction for the task. Otherwise as `fit`.
        """
        teacher, corrections, found = Individual(task, individual, self.encoder), self._of(task), {}
        with evaluating(self.encoder, teacher.module):
            for at, position in enumerate(self.positions):
                before = {name: corrections[name] for name in self.positions[:at]}
                pairs = (self._pair(task, teacher, position, before, x) for x in once(task, inputs))
                found[position] = measure_bias(pairs, corrections[position])
        return found

    def _of(self, task: str) -> dict[str, Correction]:
        if task not in self.tasks:
            known = ", ".join(map(repr, self.tasks)) or "none; call fit first"
            raise UnknownIdError(f"there is no correction for task {task!r}", hint=f"known are: {known}")
        corrections: Any = self.corrections[self.tasks.index(task)]
        return dict(zip(self.positions, corrections, strict=True))

    def _fit_task(
        self,
        task: str,
        teacher: Individual,
        inputs: Inputs,
        seed: int,
        on_step: Callable[[str, int, Correction], None] | None,
        report: SurgeryReport,
    ) -> dict[str, Correction]:
        """The corrections of one task, position by position."""
        done: dict[str, Correction] = {}
        bias: dict[str, Bias] = {}
        losses: dict[str, Tensor] = {}
        config, generator = self.config, generator_of(seed, task)
        for position in self.positions:
            pair = partial(self._pair, task, teacher, position, dict(done))
            pairs = Pairs(task, inputs, pair, cache=config.cache, batch_size=config.batch_size, seed=seed)
            if pairs.size < config.rank:
                message = (
                    f"task {task!r} has {pairs.size} inputs for a correction of rank {config.rank}: it fits them alone"
                )
                warnings.warn(message, stacklevel=3)
            if pairs.size > 1 and pairs.constant:
                warnings.warn(f"the merged features of task {task!r} are the same for all inputs", stacklevel=3)
            axis = config.axis if position else -1
            if axis == 0 or not -len(pairs.shape) < axis < len(pairs.shape):
                raise ConfigError(
                    f"axis is {axis}; the output of layer {position!r} has the axes 1 to {len(pairs.shape) - 1}",
                    hint="axis says where the features of a layer are: -1 is the last one, 1 is for convolutions",
                )
            correction = Correction(
                pairs.shape[axis], config.rank, activation=config.activation, axis=axis, generator=generator
            ).to(pairs.device)
            if config.activation == "relu":
                _wake(correction, pairs)
            watch = on_step if position == OUTPUT else None
            losses[position] = _train(task, correction, pairs, config, watch)
            done[position] = correction.requires_grad_(False)
            bias[position] = measure_bias(pairs, correction)
        report.bias[task], report.losses[task] = bias, losses
        report.parameters[task] = sum(p.numel() for each in done.values() for p in each.parameters())
        return done

    def _pair(
        self, task: str, teacher: Individual, position: str, corrections: Mapping[str, Correction], x: Any
    ) -> Pair:
        """What both networks give at a position for one batch, in float32 or float64.

        Raises:
            DataError: the sizes differ, or a value is not finite.
        """
        z = look(self.encoder, self.encoder, x, position, corrections, task)
        target = look(teacher, teacher.module, x, position, {}, task).to(z.device)
        where = f"layer {position!r}" if position else "the features"
        if z.shape != target.shape:
            axis = self.config.axis if position else -1
            raise DataError(
                f"{where}: the merged network gives {z.shape[axis]} dimensions (shape {tuple(z.shape)}), the individual "
                f"one of task {task!r} {target.shape[axis]} (shape {tuple(target.shape)})",
                hint="both must be of one architecture",
            )
        for who, found in (("the merged network", z), (f"the individual network of task {task!r}", target)):
            if not bool(torch.isfinite(found).all()):
                raise DataError(
                    f"{where} of {who} are not finite numbers on inputs of task {task!r}",
                    hint="look for such values in the inputs and the weights",
                )
        return (z, target) if z.dtype == torch.float64 else (z.float(), target.float())

    def save(self, path: Path | str) -> None:
        """Write the corrections, without the network, to a safetensors file.

        Raises:
            StorageError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        about = {"tasks": self.tasks, "layers": self.positions[:-1], "settings": self.config.model_dump(mode="json")}
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.corrections.state_dict().items()
        }
        try:
            with atomic_file(path) as aside:
                save_file(tensors, aside, metadata={"format": FORMAT, "about": json.dumps(about)})
        except SafetensorError as error:
            raise StorageError(f"the corrections cannot be written: {error}", where=str(path)) from error

    @classmethod
    def load(cls, path: Path | str, encoder: nn.Module) -> Surgery:
        """The corrections of a file, around the merged network they were trained on.

        Raises:
            StorageError: there is no such file, or it holds no corrections. ConfigError: the network has not the layers.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise StorageError(f"there is no file {str(path)!r}", hint="give the path that `save` was given")
        try:
            with safe_open(path, framework="pt") as file:
                found = file.metadata() or {}
                if found.get("format") != FORMAT:
                    raise StorageError(f"{Path(path).name!r} holds no corrections", hint="write it with Surgery.save")
                about = json.loads(found["about"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            made = cls(encoder, layers=about["layers"], **about["settings"])
            for number, task in enumerate(about["tasks"]):
                made.tasks.append(task)
                made.corrections.append(
                    nn.ModuleList(made._read(tensors, f"{number}.{at}", p) for at, p in enumerate(made.positions))
                )
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise StorageError(
                f"{Path(path).name!r} cannot be read as corrections: {error}", where=str(path)
            ) from error
        return made

    def _read(self, tensors: State, at: str, position: str) -> Correction:
        down, up = tensors[f"{at}.down"], tensors[f"{at}.up"]
        axis = self.config.axis if position else -1
        made = Correction(down.shape[1], len(down), activation=self.config.activation, axis=axis)
        made.down.data, made.up.data = down, up
        return made.requires_grad_(False).to(place_of(self.encoder))


@torch.no_grad()
def measure_bias(pairs: Iterable[Pair], correction: Correction) -> Bias:
    """The bias over all pairs of features `z`, `z_k` `(B, ..., D)`, before and after a correction."""
    before: Any = 0.0
    after: Any = 0.0
    scale, rows, inputs = 0.0, 0, 0
    fires = torch.zeros(len(correction.down), dtype=torch.bool, device=correction.down.device)

    def summed(x: Tensor) -> Tensor:
        return x.abs().movedim(correction.axis, -1).flatten(0, -2).double().sum(0).cpu()

    for z, target in pairs:
        before, after = before + summed(target - z), after + summed(target - correction(z))
        scale, rows = scale + float(summed(target).mean()), rows + z.numel() // z.shape[correction.axis]
        inputs += len(z)
        fires |= (correction.units(z) > 0).flatten(0, -2).any(0)
    return Bias((before / rows).float(), (after / rows).float(), scale / rows, inputs, int((~fires).sum()))


@torch.no_grad()
def _wake(correction: Correction, pairs: Iterable[Pair]) -> None:
    """Mirror the units that are silent on all inputs."""
    fires = torch.zeros(len(correction.down), dtype=torch.bool, device=correction.down.device)
    for z, _ in pairs:
        fires |= (correction.units(z) > 0).flatten(0, -2).any(0)
    correction.down[~fires] *= -1


def _train(
    task: str,
    correction: Correction,
    pairs: Pairs,
    config: SurgeryConfig,
    on_step: Callable[[str, int, Correction], None] | None,
) -> Tensor:
    """Train one correction; the losses of all steps `(steps,)`."""
    steps = config.steps
    if config.passes is not None:
        steps = config.passes * (pairs.size // min(config.batch_size, pairs.size))
    if not steps or not config.rank:
        return torch.empty(0)
    optimizer = torch.optim.Adam(correction.parameters(), lr=config.learning_rate)
    distance, losses = DISTANCES[config.distance], []
    for step in range(1, steps + 1):
        z, target = pairs.next()
        with torch.enable_grad():
            loss = distance(correction(z), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(task, step, correction)
    found = torch.stack(losses).cpu()
    if not bool(torch.isfinite(found).all()):
        step = int((~torch.isfinite(found)).nonzero()[0, 0]) + 1
        raise TrainingError(
            f"the loss of task {task!r} is not a finite number at step {step}", hint="lower learning_rate"
        )
    return found
