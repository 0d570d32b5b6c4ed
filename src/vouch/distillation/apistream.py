"""API stream: one network learns from prediction services, one after the other, on inputs that generators make up.

Source: Continual Learning From a Stream of APIs, arXiv 2309.00023 (TPAMI 2024). For each API `T_k` in turn, fresh
generators look for pictures on which it and the own network `f` disagree (phase 1), and `f` learns its answers on them
(phase 2), while answers recorded from earlier APIs are replayed and the layers of `f` are kept similar to what they
were before:

    generators:   - E gap(f, T_k) + balance sum_c p_c log p_c + cooperation cos(f's features of both batches)
    own network:    E gap(f, T_k) + sum_{j<k} E_{memory j} gap(f, recorded) + similarity (1 - CKA(f, f before k))

The gap's gradient through the API is a zeroth-order estimate on the generators' output before the tanh. With a few
real inputs (`raw`) this is the paper's DECL-APIs, without any it is DFCL-APIs.

The paper has no public code. Its framework is followed; these are choices made here: the gap is the mean absolute
difference of centred log-probabilities (`kl` is the alternative); the balance term, cosine similarity as what drives
the generators apart, and linear CKA as network similarity; by default the share of `f` itself in the gap's gradient
is exact and only the API's is estimated, at no more queries; similarity is measured in evaluation mode, so that it is
0 at the start whatever layers there are; generators that collapsed are given time, since at the start of an API they
often do and the balance term brings them back within some hundred steps; the answer to a real input is asked for once
and kept; a share of an API's memory is its real inputs. Class-incremental accuracy is reported, not promised: each
API only ranks its own classes.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vouch.config import Choice, Config, Span, setting
from vouch.distillation.apis import Api, ApiError, Ledger
from vouch.distillation.generators import GENERATORS
from vouch.distillation.memory import GrowingHead
from vouch.distillation.similarity import compared_layers, evaluating
from vouch.distillation.streamcheck import check_test, feature_width, still_to_learn
from vouch.distillation.streamstate import pack, unpack
from vouch.distillation.streamtask import Task
from vouch.errors import ConfigError, UnknownIdError, did_you_mean
from vouch.training import Run, seeded
from vouch.training.checkpoints import HEADER, save_checkpoint
from vouch.training.devices import parse_device, seed_of
from vouch.training.logs import TrainingLog

Pictures = Mapping[str, Tensor]
"""Inputs `(n, C, H, W)` in [-1, 1] by API name."""
Tests = Mapping[str, tuple[Tensor, Tensor]]
"""Inputs and labels `(n,)`, counted as the API counts its classes, by API name."""


class APIStreamConfig(Config):
    """Settings; the paper's values are not known, so these are what the literature on data-free extraction uses."""

    queries: Literal["generators", "noise", "raw"] = setting(
        "generators", "where inputs come from; uniform noise and real inputs alone are baselines"
    )
    generators: int = setting(2, "generators that work together", ge=1)
    generator: Literal["mlp", "conv"] = setting("mlp", "their network")
    latent: int = setting(32, "numbers a generator starts from", ge=1)
    generator_width: int = setting(128, "hidden units of `mlp`, channels of `conv` (64 in the literature)", ge=1)
    iterations: int = setting(400, "rounds of one generator step and some model steps for each API", ge=1)
    model_steps: int = setting(4, "steps of the own network in a round", ge=1)
    batch_size: int = setting(128, "inputs of one step, all generators together", ge=2)
    learning_rate: float = setting(1e-3, "of the own network", gt=0, search=Span(3e-4, 3e-3, log=True))
    generator_learning_rate: float = setting(1e-3, "of the generators (Adam)", gt=0, search=Span(1e-4, 3e-3, log=True))
    optimizer: Literal["adam", "sgd"] = setting("adam", "of the own network; sgd has momentum 0.9")
    weight_decay: float = setting(0.0, "of the own network", ge=0)
    decay_at: tuple[float, ...] = setting((), "shares of an API's steps after which the own learning rate falls to 0.3")
    gap: Literal["l1", "kl"] = setting("l1", "difference of centred log-probabilities, or divergence")
    directions: int = setting(4, "m, random directions of one gradient estimate", ge=1)
    eps: float = setting(1e-2, "their length, before the tanh", gt=0, search=Span(1e-3, 0.3, log=True))
    own_gradient: Literal["exact", "estimated"] = setting("exact", "how the own network's part of the gap is derived")
    balance: float = setting(1.0, "weight of the term that asks for all of an API's classes", ge=0)
    cooperation: float = setting(0.5, "weight of the term that drives the generators apart", ge=0)
    memory: int = setting(1000, "recorded answers kept of each API", ge=0)
    replay: int = setting(32, "of them replayed in a step, for each earlier API", ge=1)
    similarity: float = setting(
        1.0, "lambda, weight of the similarity to the network before", ge=0, search=Choice((0.0, 0.3, 1.0, 3.0))
    )
    layers: tuple[str, ...] = setting((), "modules compared; all weight matrices and the features where empty")
    raw_share: float = setting(0.25, "of a step's inputs that are real, where there are real ones", ge=0, le=1)
    head: Literal["one", "per_api"] = setting(
        "one", "one output a class, or outputs of its own for each API, centred when compared with others"
    )
    collapse: float = setting(
        0.05, "the answers' class entropy (1 is even) below which generators have collapsed", ge=0
    )
    collapse_patience: int = setting(1000, "model steps below it in a row that end an API's training", ge=1)
    save_every: int = setting(100, "rounds between two saved states", ge=1)


@dataclass(frozen=True)
class StreamReport:
    """What came of learning a stream.

    Attributes:
        apis: names in the order learned. stopped: why each one's training ended: `finished`, `budget`, `collapsed`.
        task, classes: accuracy on API `j`'s test after API `i`, `[i][j]`, with only its classes allowed, and with all
            classes seen so far; None where there was no test.
        ledger: rows `{"api", "phase", "queries", "failed", "cost"}`.
        history: one row a round of this call: gap, losses, entropy of the answers.
        seconds: of this call.
    """

    apis: list[str]
    stopped: list[str]
    task: list[list[float | None]]
    classes: list[list[float | None]]
    ledger: list[dict[str, Any]]
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    seconds: float = 0.0

    @staticmethod
    def average(matrix: list[list[float | None]]) -> float:
        """Mean accuracy after the last API; not a number without tests."""
        last = [value for value in matrix[-1] if value is not None] if matrix else []
        return sum(last) / len(last) if last else math.nan

    @staticmethod
    def forgetting(matrix: list[list[float | None]]) -> float:
        """`mean_{j < K} (A[j][j] - A[K][j])`; 0 with one API."""
        pairs = [(matrix[j][j], matrix[-1][j]) for j in range(len(matrix) - 1)]
        lost = [first - last for first, last in pairs if first is not None and last is not None]
        return sum(lost) / len(lost) if lost else 0.0


class APIStream(nn.Module):
    """A network that learns from APIs, one after the other; calling it gives scores `(B, n_classes)`."""

    Config = APIStreamConfig

    def __init__(
        self,
        features: nn.Module,
        shape: tuple[int, int, int],
        *,
        mapping: Mapping[str, Mapping[str, str]] | None = None,
        make_generator: Callable[[int, tuple[int, int, int]], nn.Module] | None = None,
        **settings: Any,
    ) -> None:
        """A stream that has learned nothing yet.

        Args:
            features: any network from pictures `(B, *shape)` in [-1, 1] to features `(B, D)`; its weights are trained.
            shape: `(C, H, W)`.
            mapping: by API name, what its classes are called here. Needed for a class that an earlier API has under
                the same name: the same name says that it is the same, another name that it is not.
            make_generator: from `(latent, shape)` a network `(B, latent)` to pictures before the tanh, for others than
                the setting `generator` has.
            settings: see `APIStreamConfig`.

        Raises:
            ConfigError: a setting does not fit, or `features` does not give `(B, D)` for such pictures.
        """
        super().__init__()
        self.config = APIStreamConfig(**settings)
        self.features, self.shape = features, shape
        self.mapping = mapping or {}
        self.make_generator = make_generator
        self.head = GrowingHead(feature_width(features, shape), share=self.config.head == "one")
        self.layers = compared_layers(features, self.config.layers)
        self.ledger, self.device = Ledger(), torch.device("cpu")
        self.apis: list[str] = []
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.stopped: list[str] = []
        self.matrices: dict[str, list[list[float | None]]] = {"task": [], "classes": []}
        self.task: Task | None = None
        self.rounds = self.saves = 0

    @property
    def classes(self) -> list[str]:
        """The classes learned, in the order of the scores."""
        return self.head.classes

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(B, n_classes)` of pictures `(B, C, H, W)`.

        Raises:
            ConfigError: nothing was learned yet.
        """
        if not self.classes:
            raise ConfigError("the stream knows no class yet", hint="call learn(apis), or load(path)")
        return self.head.scores(self.head(self.features(x)))

    @torch.no_grad()
    def accuracy(self, name: str, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
        """Task- and class-incremental accuracy on labels `(n,)` counted as API `name` counts its classes.

        Raises:
            UnknownIdError: no API of that name was learned. ConfigError: inputs or labels do not fit it.
        """
        if name not in self.apis:
            raise UnknownIdError(f"no API {name!r} was learned", hint=did_you_mean(name, self.apis))
        check_test(name, inputs, labels, self.shape, len(self.head.groups[self.apis.index(name)]))
        columns = self.head.groups[self.apis.index(name)]
        own = torch.tensor([self.head.owner[column] for column in columns])
        within, among = 0, 0
        with evaluating(self.features):
            for x, y in zip(inputs.split(1024), labels.cpu().split(1024), strict=True):
                outputs = self.head(self.features(x.to(self.device, torch.float32))).cpu()
                within += int((outputs[:, columns].argmax(1) == y).sum())
                among += int((self.head.scores(outputs).argmax(1) == own[y]).sum())
        return within / len(labels), among / len(labels)

    def learn(
        self,
        apis: Api | Sequence[Api],
        *,
        raw: Pictures | None = None,
        tests: Tests | None = None,
        run: Run | None = None,
    ) -> StreamReport:
        """Learn APIs in order; those learned already are passed over, so a stream may be continued at any time.

        Args:
            raw: a few real inputs of some APIs; no labels are needed. The answer to each is asked for once.
            tests: what the accuracy after each API is measured on.
            run: its `path` keeps state, log and ledger; `seed`, `device`, `resume` and `mlflow` as elsewhere.
                With `resume` a stream goes on after the last step that an API answered.

        Raises:
            ConfigError: anything about the APIs that does not fit, found before any query is spent.
            ApiError: an API stopped answering. What was learned so far stays in this object, and in `run.path`.
            TrainingError: a loss is not a number. StorageError: the state cannot be written or read.
        """
        run, begin = run or Run(), time.perf_counter()
        apis, raw, tests = list(apis) if isinstance(apis, Sequence) else [apis], raw or {}, tests or {}
        kind, index = parse_device(run.device)
        self.device = torch.device(kind if index is None else f"{kind}:{index}")
        self.to(self.device)
        self._open(run)
        todo = still_to_learn(self, apis, raw, tests, run)
        history: list[dict[str, Any]] = []
        log = TrainingLog(
            None if run.path is None else Path(run.path) / "log.jsonl",
            mlflow=run.mlflow,
            settings=self.config.model_dump(mode="json"),
            keep=self.rounds,
        )
        with log, seeded(run.seed):
            for api in todo:
                if self.task is None:
                    torch.manual_seed(seed_of(run.seed, len(self.apis)))
                    self.task = Task.begin(self, api, self.names(api), raw.get(api.name))
                try:
                    for row in self.task.rounds(api, run.seed):
                        self.rounds += 1
                        history.append({"step": self.task.step, "epoch": self.rounds, "api": api.name, **row})
                        log.write(history[-1:])
                        if self.rounds % self.config.save_every == 0:
                            self._keep(run)
                except ApiError:
                    self._keep(run)
                    raise
                self._finish(self.task, tests)
                self._keep(run)
        seconds = time.perf_counter() - begin
        return StreamReport(
            list(self.apis),
            list(self.stopped),
            **copy.deepcopy(self.matrices),
            ledger=self.ledger.rows,
            history=history,
            seconds=seconds,
        )

    def save(self, path: Path | str) -> None:
        """Write weights, memory and what is under way to a folder.

        Raises:
            StorageError: it cannot be written.
        """
        save_checkpoint(Path(path), *pack(self))

    def load(self, path: Path | str) -> None:
        """Take over what `save` wrote from a stream with the same settings and features.

        Raises:
            StorageError: it is missing, damaged, or of another network.
            ConfigError: it was saved with other settings.
        """
        unpack(self, Path(path))
        self.eval()

    def make_generators(self) -> nn.ModuleList:
        """Fresh generators, as many as the settings ask for."""
        config = self.config
        if config.queries != "generators":
            return nn.ModuleList()
        make = self.make_generator or (lambda z, shape: GENERATORS[config.generator](z, shape, config.generator_width))
        return nn.ModuleList(make(config.latent, self.shape) for _ in range(config.generators))

    def real_rows(self, raw: Tensor | None) -> int:
        """Real inputs of one model step."""
        if raw is None or not len(raw):
            return 0
        share = 1.0 if self.config.queries == "raw" else self.config.raw_share
        return round(share * self.config.batch_size)

    def round_cost(self, raw: Tensor | None) -> int:
        """Queries of one round."""
        config = self.config
        search = config.batch_size * (config.directions + 1) if config.queries == "generators" else 0
        return search + config.model_steps * (config.batch_size - self.real_rows(raw))

    def _finish(self, task: Task, tests: Tests) -> None:
        """Put down what is kept of an API, and measure."""
        self.memory.append(task.kept())
        self.apis.append(task.name)
        self.stopped.append(task.stopped)
        self.task = None
        self.eval()
        rows = [self.accuracy(name, *tests[name]) if name in tests else (None, None) for name in self.apis]
        self.matrices["task"].append([row[0] for row in rows])
        self.matrices["classes"].append([row[1] for row in rows])

    def names(self, api: Api) -> list[str]:
        """What an API's classes are called here."""
        given = self.mapping.get(api.name, {})
        return [given.get(name, name) for name in api.classes]

    def _keep(self, run: Run) -> None:
        if run.path is not None:
            self.save(Path(run.path) / "state")

    def _open(self, run: Run) -> None:
        """Find ledger and state in the run's folder, or put them there."""
        if run.path is None:
            return
        path = Path(run.path) / "ledger.jsonl"
        if self.ledger.path != path and path.exists() and not run.resume:
            raise ConfigError(
                f"a stream was learned in {path.parent.name!r} before",
                where=str(path.parent),
                hint="Run(resume=True) to go on with it, or another folder",
            )
        self.ledger.keep_in(path)
        if run.resume and (path.parent / "state" / HEADER).exists():
            self.load(path.parent / "state")
