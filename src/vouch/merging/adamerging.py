"""AdaMerging: merging coefficients learned without labels, so that the merged network is sure of its predictions.

Source: AdaMerging: Adaptive Model Merging for Multi-Task Learning, arXiv 2310.02575. With the task vectors
`tau_k = theta_k - theta_0` and one coefficient for each task and named tensor `l` (or for each task),

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l,
    min_lambda  sum_k  E_x  H(softmax(head_k(f_theta(x)))),    H(p) = -sum_c p_c log p_c,

with `x` unlabelled inputs of task `k`. AdaMerging++ (`keep=0.2`) takes the entries of the task vectors that TIES keeps.
What differs from the authors' code, with the same result:
- No graph goes through the sum over models: `theta` is a leaf, and `dH/dlambda_k^l = <dH/dtheta^l, tau_k^l>`. So one
  network's gradient is held, not those of all, and task vectors may lie in memory or on disk (`vectors`).
- It stops where the predictions of a task fall together on few classes (`collapse`), which entropy alone rewards.

The paper adapts to the very inputs that it reports on. Inputs of the same kind do; report on others.

`K` models, `L` named tensors.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from vouch.config import Config, Span, setting
from vouch.errors import ConfigError, DataError, TrainingError
from vouch.evaluation.cost import measure
from vouch.merging.arithmetic import weighted
from vouch.merging.states import Family, Models, by_model, required
from vouch.merging.stored import Source, State
from vouch.merging.ties import Trimmed
from vouch.merging.unlabelled import Endless, Head, Inputs, check_labels, encode, evaluating, moved, place_of

WINDOW = 256
"""Fewest predictions that the spread over classes is judged by."""


class AdaMergingConfig(Config):
    """Settings of AdaMerging."""

    by: Literal["layer", "task"] = setting("layer", "a coefficient for each task and named tensor, or for each task")
    keep: float | None = setting(None, "share of entries that TIES keeps first; 0.2 is AdaMerging++", gt=0, le=1)
    start: float = setting(0.3, "the coefficients before learning", ge=0, le=1)
    steps: int = setting(500, "updates", ge=0, search=Span(100, 2000, log=True))
    batch_size: int = setting(16, "inputs of a batch; batches given as such keep their own size", ge=1)
    batches: int = setting(2, "batches of each task in an update", ge=1)
    learning_rate: float = setting(1e-3, "of Adam; a coefficient moves by at most about this in a step", gt=0)
    clamp: bool = setting(True, "use the coefficients cut to [0, 1]")
    scale: bool = setting(False, "divide each task's entropy by log C, so that tasks of many classes do not dominate")
    collapse: float = setting(0.5, "stop when the entropy of a task's predicted classes is below this x log C", ge=0)
    objective: Literal["entropy", "labels"] = setting("entropy", "labels, as a control: their cross-entropy")
    vectors: Literal["device", "cpu", "disk"] = setting(
        "device", "where the task vectors are held; disk reads each time"
    )
    seed: int = setting(0, "draws the batches", ge=0)


@dataclass
class AdaMergingReport:
    """How the learning went.

    Attributes:
        entropy: of each task, mean of each step. spread: entropy of the classes predicted lately, as a share of log C.
        steps: updates made. stopped: `finished`, or `collapse of TASK`.
        seconds: of the learning. memory_mb: most memory, in MiB: allocated on the GPU, or taken by the process.
    """

    entropy: dict[str, list[float]] = field(default_factory=dict)
    spread: dict[str, list[float]] = field(default_factory=dict)
    steps: int = 0
    stopped: str = "finished"
    seconds: float = 0.0
    memory_mb: float = 0.0


@dataclass(frozen=True, eq=False)
class AdaMerged:
    """What AdaMerging gives.

    Attributes:
        state: the merged one, as `Family.merge` gives it.
        coefficients: `(L, K)` by layer, `(K,)` by task; as used, that is clamped where they were.
        layers, tasks: names of the `L` tensors and the `K` models.
    """

    state: State
    coefficients: Tensor
    layers: list[str]
    tasks: list[str]
    report: AdaMergingReport

    def weights(self) -> dict[str, list[float]]:
        """The coefficients of each named tensor, as `task_arithmetic` takes them."""
        rows = self.coefficients.expand(len(self.layers), -1).tolist()
        return dict(zip(self.layers, rows, strict=True))


OnStep = Callable[[int, Tensor], None]
"""Told after each update: its number from 1, and the coefficients."""


def adamerging(
    network: nn.Module,
    base: Source,
    models: Models,
    inputs: Mapping[str, Inputs] | Sequence[Inputs],
    heads: Mapping[str, Head] | Sequence[Head] | None = None,
    *,
    config: AdaMergingConfig | None = None,
    on_step: OnStep | None = None,
    out: str | Path | None = None,
    exclude: Sequence[str] = (),
    max_distance: float | None = 1.0,
    **settings: Any,
) -> AdaMerged:
    """Learn the coefficients on unlabelled inputs, and merge with them.

    Args:
        network: of the models' architecture; its own weights are neither used nor changed. It runs in evaluation mode
            and float32, on the device where it is.
        base: what the models were fine-tuned from. models: states, networks or files, in a list or by name.
        inputs: of each model's task, in the models' order or by their names. Labels are not read.
        heads: of each task, from the network's features to logits; left as they are. Without, what the network gives
            is logits; tensors excluded from merging, such as `exclude=["head.*"]`, are each model's own meanwhile.
        on_step: for a record of the way. out, exclude, max_distance: see `Options`.
        settings: those of `AdaMergingConfig`, in place of `config`.

    Raises:
        DataError: the models differ, have values that are not finite, or do not descend from the base; or a task has
            no inputs. ConfigError: names or numbers of models, inputs and heads do not fit, the network has parameters
            that no model has or cannot read the inputs, or a task has a single class. TrainingError: an entropy is not
            a finite number. StorageError: a file cannot be read or written.
    """
    config = config or AdaMergingConfig(**settings)
    family = Family(models, required(base), network=network, out=out, exclude=exclude, max_distance=max_distance)
    if isinstance(inputs, Tensor):
        raise ConfigError("inputs is one tensor", hint="give a list with the inputs of each model's task")
    streams: dict[str, Endless] = {
        who: Endless(who, given, config.batch_size, config.seed)  # type: ignore[arg-type]
        for who, given in by_model(inputs, family.names, "inputs").items()
    }
    with measure() as cost:
        mixture = Mixture(network, family, heads, config)
        report = _learn(mixture, streams, config, on_step)
    report.seconds, report.memory_mb = cost.wall_seconds, cost.peak_memory_mb
    if mixture.device.type == "cuda":
        report.memory_mb = torch.cuda.max_memory_allocated(mixture.device) / 2**20
    coefficients = mixture.used().cpu()
    told = {"config": config.model_dump(mode="json"), "coefficients": coefficients.tolist(), "layers": mixture.layers}

    def recipe(name: str, base: Tensor | None, models_K: Tensor) -> Tensor:
        assert base is not None
        return base + weighted(mixture.row(coefficients, name), mixture.kept(models_K - base))

    state = family.merge(recipe, "adamerging" if config.keep is None else "adamerging++", **told)
    return AdaMerged(state, coefficients, mixture.layers, family.names, report)


class Mixture:
    """The merged network as a function of its coefficients.

    Attributes:
        raw: the coefficients that are learned, `(L, K)` or `(K,)`. layers: the `L` names.
    """

    def __init__(
        self,
        network: nn.Module,
        family: Family,
        heads: Mapping[str, Head] | Sequence[Head] | None,
        config: AdaMergingConfig,
    ) -> None:
        """Read the task vectors, and check that network and states fit.

        Raises:
            ConfigError, DataError: see `adamerging`.
        """
        self.network, self.family, self.config = network, family, config
        self.device, self.layers, tasks = place_of(network), family.parameters, family.names
        given: dict[str, Any] = dict.fromkeys(tasks) if heads is None else by_model(heads, tasks, "heads")
        self.heads: dict[str, Head | None] = given
        self.trimmed = None if config.keep is None else Trimmed(family, config.keep)
        shape = (len(tasks),) if config.by == "task" else (len(self.layers), len(tasks))
        wide = any(family.layout[name][0] == torch.float64 for name in self.layers)
        dtype = torch.float64 if wide else torch.float32
        self.raw = nn.Parameter(torch.full(shape, config.start, device=self.device, dtype=dtype))
        self._place = {name: at for at, name in enumerate(self.layers)}
        self._held = {} if config.vectors == "disk" else {name: self._read(name) for name in self.layers}
        if config.vectors == "disk":
            for name in self.layers:
                family.read(name)
        family.check_distance()
        self._fixed = {name: family.read(name)[1].mean(0).to(self.device) for name in family.statistics}
        self._own = {who: self._tensors_of(state) for who, state in family.models.items()}
        self._check()

    def used(self) -> Tensor:
        """The coefficients as they are used."""
        raw = self.raw.detach()
        return raw.clamp(0, 1) if self.config.clamp else raw.clone()

    def row(self, coefficients: Tensor, name: str) -> Tensor:
        """Those of one named tensor `(K,)`."""
        return coefficients if coefficients.ndim == 1 else coefficients[self._place[name]]

    def kept(self, tau_K: Tensor) -> Tensor:
        """The task vectors' entries that are merged: all, or those that TIES keeps."""
        return tau_K if self.trimmed is None else self.trimmed.agreed(tau_K)

    def theta(self) -> dict[str, Tensor]:
        """The merged parameters, as leaves that collect gradients."""
        coefficients, merged = self.used(), {}
        for name in self.layers:
            base, tau_K = self.vectors(name)
            merged[name] = (base + weighted(self.row(coefficients, name), tau_K)).requires_grad_()
        return merged

    def vectors(self, name: str) -> tuple[Tensor, Tensor]:
        """The base's tensor and the task vectors `(K, ...)`, on the network's device."""
        base, tau_K = self._held[name] if self._held else self._read(name)
        return base.to(self.device), tau_K.to(self.device)

    def logits(self, task: str, theta: Mapping[str, Tensor], x: Any) -> Tensor:
        """What the merged network says to inputs of a task `(B, C)`.

        Raises:
            ConfigError: it cannot read them, gives no features or logits `(B, C)`, or a single class.
        """
        tensors = {**self._fixed, **self._own[task], **theta}
        found = encode(
            lambda *args, **named: functional_call(self.network, tensors, args, named),
            moved(x, self.device),
            self.heads[task],
            task,
        )
        if found.shape[1] < 2:
            raise ConfigError(f"task {task!r} has a single class: its entropy is always 0", hint="leave it out")
        return found

    @torch.no_grad()
    def gather(self, theta: Mapping[str, Tensor]) -> None:
        """Put the gradient of the coefficients into `raw.grad`: inner products of `theta`'s with the task vectors."""
        grad = torch.zeros_like(self.raw)
        for name in self.layers:
            found = theta[name].grad
            if found is None:  # the network does not use it
                continue
            _, tau_K = self.vectors(name)
            grad[... if grad.ndim == 1 else self._place[name]] += tau_K.flatten().view(len(tau_K), -1) @ found.flatten()
        if self.config.clamp:  # as `torch.clamp` has it: 0 outside, passed on at the ends
            grad *= (self.raw >= 0) & (self.raw <= 1)
        self.raw.grad = grad

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        base, models_K = self.family.read(name)
        assert base is not None
        place = self.device if self.config.vectors == "device" else torch.device("cpu")
        return base.to(place), self.kept(models_K - base).to(place)

    def _tensors_of(self, state: State) -> dict[str, Tensor]:
        """What is not merged but a model's own, and known to the network."""
        known = {name for name, _ in [*self.network.named_parameters(), *self.network.named_buffers()]}
        own = [name for name in state if name in known and name not in self.family.layout]
        found = {name: state[name].detach().to(self.device) for name in own}
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}

    def _check(self) -> None:
        """The network's parameters and those merged are the same."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.network.named_parameters()}
        hint = "build the network that the models' states belong to"
        for name in self.layers:
            if name in shapes and shapes[name] != self.family.layout[name][1]:
                raise ConfigError(
                    f"{name!r} has the shape {self.family.layout[name][1]} in the base and {shapes[name]} in the network",
                    hint=hint,
                )
        for who, own in self._own.items():
            missing = [name for name in shapes if name not in self._place and name not in own]
            if missing:
                raise ConfigError(f"model {who!r} has no {missing[0]!r}, which the network has", hint=hint)
        if not any(name in shapes for name in self.layers):
            raise ConfigError(f"the network has no {self.layers[0]!r} or any other merged tensor", hint=hint)


def _learn(
    mixture: Mixture, streams: Mapping[str, Endless], config: AdaMergingConfig, on_step: OnStep | None
) -> AdaMergingReport:
    """Adam on the coefficients."""
    report = AdaMergingReport({task: [] for task in streams}, {task: [] for task in streams})
    optimizer = torch.optim.Adam([mixture.raw], lr=config.learning_rate)
    spread = {task: Spread() for task in streams}
    with evaluating(mixture.network, *mixture.heads.values()), torch.enable_grad():
        for step in range(1, config.steps + 1):
            theta = mixture.theta()
            leaves = list(theta.values())
            for task, stream in streams.items():
                total = 0.0
                for _ in range(config.batches):
                    x, y = stream.next()
                    logits = mixture.logits(task, theta, x)
                    mean = entropy(logits).mean()
                    loss = mean if config.objective == "entropy" else _cross_entropy(task, logits, y)
                    loss = loss / math.log(logits.shape[1]) if config.scale else loss
                    if not bool(torch.isfinite(loss)):
                        raise TrainingError(
                            f"the {config.objective} of task {task!r} is not a finite number in step {step}",
                            hint="look for such values in its inputs, or lower the learning rate",
                        )
                    loss.backward(inputs=leaves)
                    total += float(mean.detach())
                    spread[task].add(logits.detach())
                report.entropy[task].append(total / config.batches)
                report.spread[task].append(spread[task].share())
            fallen = [task for task in streams if spread[task].full and report.spread[task][-1] < config.collapse]
            if fallen:
                report.stopped = f"collapse of {fallen[0]}"
                warnings.warn(
                    f"AdaMerging stopped in step {step}: predictions of task {fallen[0]!r} fell together on few "
                    "classes; look at its inputs, or pass collapse=0 if they are of few classes",
                    stacklevel=3,
                )
                break
            mixture.gather(theta)
            optimizer.step()
            report.steps = step
            if on_step is not None:
                on_step(step, mixture.used().cpu())
    return report


class Spread:
    """Over how many classes the latest predictions are spread: the entropy of their histogram by log C."""

    def __init__(self) -> None:
        self._counts: deque[Tensor] = deque()
        self._sum = torch.zeros(0)
        self.full = False

    def add(self, logits: Tensor) -> None:
        """Count the predictions of a batch `(B, C)`, and forget those beyond the latest `max(WINDOW, 10 C)`."""
        counts = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).cpu()
        self._sum = counts + (self._sum if self._counts else 0)
        self._counts.append(counts)
        most = max(WINDOW, 10 * len(counts))
        while int(self._sum.sum() - self._counts[0].sum()) >= most:
            self._sum = self._sum - self._counts.popleft()
        self.full = int(self._sum.sum()) >= most

    def share(self) -> float:
        """In [0, 1]."""
        p = self._sum.double() / self._sum.sum()
        return max(0.0, float(-torch.special.xlogy(p, p).sum()) / math.log(len(p)))


def entropy(logits: Tensor) -> Tensor:
    """`H(softmax(logits))` `(B,)` of logits `(B, C)`, in nats."""
    log_p = (logits.float() if logits.dtype.itemsize < 4 else logits).log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def _cross_entropy(task: str, logits: Tensor, y: Tensor | None) -> Tensor:
    if y is None:
        raise DataError(f"there are no labels of task {task!r}", hint="give (inputs, labels), or objective='entropy'")
    check_labels(y, logits.shape[1], task)
    return F.cross_entropy(logits, y.to(logits.device))
