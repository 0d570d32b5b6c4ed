"""A recommender of several tasks: what a person will click, like and watch on, from one network.

Each row of the log is an example: the user, the events before it, the item with its attributes, and the scenario, with
one label a task (the log's feedback). Tasks are balanced by any of the balancers, or trained with AdaTask. For a
ranking each item is scored by the mean of its predicted chances, in which tasks can be weighted.

A network that reads user and item together is a ranker: it scores every item for every query, which costs as many
passes as there are items. Use it on candidates of a model that retrieves where the catalogue is large.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vouch.config import Choice, setting
from vouch.data import Cases, Interactions, Queries, Split
from vouch.data.queries import flat_rows, right_aligned
from vouch.errors import ConfigError, DataError, did_you_mean
from vouch.multitask.balancers import find
from vouch.multitask.learn import Learner, TaskBatch, learn, scores
from vouch.multitask.table import TaskTable
from vouch.multitask.towers import FieldNetwork
from vouch.recommenders.base import Recommender
from vouch.registry import Card, register
from vouch.training import FitReport, Run, TrainConfig, seeded

PAIRS = 1 << 15
"""Pairs of a query and an item scored at once."""


EXTRA = "_extra_state"
"""Under which PyTorch keeps what a resumed training needs, and a model does not."""


class MTLConfig(TrainConfig):
    """Settings of the multi-task recommender.

    Settings of the balancer are written `SLUG.NAME`, as in `MTL(balancer="gradcraft", **{"gradcraft.tau": 0.5})`, and
    kept in `balancing`.
    """

    tasks: tuple[str, ...] = setting((), "names of the log's feedback to learn; none is all of it")
    balancer: str = setting("uniform", "how the tasks' gradients are put together; adatask is an optimizer")
    balancing: dict[str, Any] = setting({}, "settings of the balancer, written SLUG.NAME=VALUE")
    optimizer: Literal["adam", "rmsprop", "adagrad"] = setting("adam", "kind of optimizer")
    architecture: Literal["shared-bottom", "mmoe", "ple"] = setting(
        "shared-bottom", "what tasks share", search=Choice(("shared-bottom", "mmoe", "ple"))
    )
    embedding_size: int = setting(16, "length of the vector of a field", ge=1)
    bottom: tuple[int, ...] = setting((64, 32), "layers of the shared part, or of an expert")
    tower: tuple[int, ...] = setting((16,), "layers of a task's own part")
    dropout: float = setting(0.2, "share of values dropped in training", ge=0, lt=1)
    interaction: bool = setting(False, "add the products of field vectors to the outputs, as DeepFM does")
    history_length: int = setting(20, "most recent items whose mean vector is an input", ge=1)
    strangers: float = setting(
        0.1, "share of training rows whose user is hidden, so that anyone can be served", ge=0, lt=1
    )
    weights: tuple[float, ...] = setting((), "weight of each task in the ranking; none is equal weights")
    batch_size: int = setting(512, "rows of the log in a batch", ge=1)
    learning_rate: float = setting(
        2e-3, "step size; adatask moves what is shared by up to this much for each task", gt=0
    )
    epochs: int = setting(12, "most passes over the training log", ge=1)
    patience: int = setting(3, "validations without a better mean AUC before training stops", ge=1)
    monitor: str = setting(
        "AUC", "validation metric that picks the best epoch: AUC (R2 where no task is binary), GAUC, or one of a task"
    )

    def __init__(self, **values: Any) -> None:
        plain = {name: value for name, value in values.items() if "." not in name}
        balancer = plain.get("balancer", type(self).model_fields["balancer"].default)
        given = dict(plain.pop("balancing", None) or {})
        for name in sorted(name for name in values if "." in name):
            slug, _, own = name.partition(".")
            if slug != balancer:
                raise ConfigError(
                    f"there are settings for {slug!r}, but the balancer is {balancer!r}", hint=f"set balancer={slug}"
                )
            given[own] = values[name]
        if given:
            if balancer == "adatask":
                raise ConfigError(
                    "adatask has no settings here", hint="its optimizers have, in vouch.multitask.adatask"
                )
            checked = find(balancer).Config(**given)
            given = {name: getattr(checked, name) for name in given}
        super().__init__(**{**plain, "balancing": given})

    def value(self, name: str) -> Any:
        """A setting by its name; None where it is that of another balancer."""
        slug, dot, own = name.partition(".")
        if not dot:
            return getattr(self, name)
        return getattr(find(slug).Config(**self.balancing), own) if slug == self.balancer else None


class Pairs(NamedTuple):
    """`n` pairs of a query and an item: user codes + 1 (0 is a stranger), items, contexts, and histories `(n, L)`."""

    user: Tensor
    item: Tensor
    scenario: Tensor
    history: Tensor


class Ranker(nn.Module):
    """Fields of users, items, their attributes and scenarios, and the mean vector of the history."""

    attributes: Tensor

    def __init__(self, sizes: list[int], attributes: Tensor, tasks: int, config: MTLConfig) -> None:
        super().__init__()
        self.register_buffer("attributes", attributes)  # (N, A) codes
        # the last field is the history: what it adds to the width comes from the items' part of the table
        self.network = FieldNetwork(
            [*sizes, 1],
            tasks,
            embedding_size=config.embedding_size,
            architecture=config.architecture,
            bottom=config.bottom,
            tower=config.tower,
            dropout=config.dropout,
            interaction=config.interaction,
        )

    def forward(self, pairs: Pairs) -> tuple[Tensor, ...]:
        """One output `(n,)` a task."""
        fields = self.network.fields
        known = (pairs.history >= 0).unsqueeze(-1)
        rows = fields.table(pairs.history.clamp(min=0) + fields.offsets[1])
        mean = (rows * known).sum(1) / known.sum(1).clamp(min=1)
        codes = torch.cat(
            [pairs.user[:, None], pairs.item[:, None], pairs.scenario[:, None], self.attributes[pairs.item]], 1
        )
        x = fields.table(codes + fields.offsets[: codes.shape[1]]).flatten(1)
        return self.network.read(torch.cat([x, mean], 1))


class LogBatches:
    """Batches of rows of a log, with the events before each."""

    def __init__(self, log: Interactions, label: NDArray[np.float32], config: MTLConfig) -> None:
        self.log, self.label, self.config = log, label, config
        self.rows = np.flatnonzero(~np.isnan(label).all(1))
        if len(self.rows) == 0:
            raise DataError("no row of the log has a label of any task")

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.config.batch_size)

    def epoch(self, generator: np.random.Generator, rank: int, world: int) -> Iterator[TaskBatch]:
        """One pass."""
        order = generator.permutation(self.rows)
        hidden = generator.random(len(order)) < self.config.strangers
        for first in range(0, len(order), self.config.batch_size):
            at = slice(first + rank, first + self.config.batch_size, world)
            rows = order[at]
            user = np.where(hidden[at], -1, self.log.user[rows])
            start = self.log.offsets[self.log.user[rows]]
            pairs = pairs_of(self.log, rows, user, start, self.config.history_length)
            yield TaskBatch(pairs, torch.from_numpy(self.label[rows]))


def pairs_of(log: Interactions, rows: NDArray[Any], user: NDArray[Any], start: NDArray[Any], length: int) -> Pairs:
    """Rows of a log as pairs: the events of the same user before each are its history."""
    history = right_aligned(log.item, start, rows, length, fill=-1)
    scenario = np.zeros(len(rows), np.int64) if log.scenario is None else log.scenario[rows].astype(np.int64) + 1
    return Pairs(
        torch.from_numpy(user.astype(np.int64) + 1),
        torch.from_numpy(log.item[rows].astype(np.int64)),
        torch.from_numpy(scenario),
        torch.from_numpy(history.astype(np.int64)),
    )


@register(
    Card(
        slug="mtl",
        name="Multi-task ranker",
        area="multitask",
        summary="clicks, likes and watch time from one network, balanced by any balancer",
        needs=("feedback",),
        baseline=True,
    )
)
class MTL(Recommender):
    """Predicts every task for a user and an item; ranks by the weighted mean of the predictions."""

    Config = MTLConfig
    config: MTLConfig
    learner: Learner
    tasks: tuple[str, ...]

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Train on the rows of the training log that have a label.

        Raises:
            DataError: the log has no feedback, or not that of a task.
        """
        run = run or Run()
        log, config = split.train, self.config
        self.prepare(log)
        self.tasks = self._tasks(log)
        label = labels_of(log, self.tasks)
        attributes, sizes = attributes_of(split)
        scenarios = len(log.labels.get("scenario", ()))
        # fields: user, item, scenario, attributes; user 0 is a stranger, scenario 0 is unknown
        self.sizes = [log.n_users + 1, log.n_items, scenarios + 1, *sizes]
        table = TaskTable("log", np.zeros((len(log), 0), np.int64), (), (), label, self.tasks)
        with seeded(run.seed):
            network = Ranker(self.sizes, attributes, len(self.tasks), config)
            self.learner = Learner(network, table)
        if config.monitor == "AUC" and not any(self.learner.binary):
            config = config.model_copy(update={"monitor": "R2"})
        self.told: dict[str, Any] = {}
        return learn(
            self.learner,
            LogBatches(log, label, config),
            config,
            run,
            balancer=config.balancer,
            optimizer=config.optimizer,
            settings=config.balancing,
            validate=lambda: self._validated(split.valid, config.monitor),
            tell=self.told,
        )

    def _tasks(self, log: Interactions) -> tuple[str, ...]:
        if not log.feedback:
            raise DataError(
                "the log has no feedback, which is what several tasks are trained on",
                hint="name its columns: --columns feedback=click+like, or --tasks click,like; the world has them",
            )
        for task in self.config.tasks:
            if task not in log.feedback:
                raise DataError(f"the log has no feedback {task!r}", hint=did_you_mean(task, log.feedback))
        tasks = self.config.tasks or tuple(log.feedback)
        if self.config.weights and len(self.config.weights) != len(tasks):
            raise DataError(f"{len(self.config.weights)} weights for {len(tasks)} tasks", hint="give one for each")
        return tasks

    def _validated(self, cases: Cases, monitor: str) -> dict[str, float]:
        found = self.measure(cases)
        if monitor not in found and monitor in ("AUC", "GAUC", "R2"):
            raise DataError(
                f"validation cannot tell {monitor}: its rows have no two labels that differ, or none of one user",
                hint="cut otherwise (--split ratio), or watch another metric (--set monitor=...)",
            )
        return found

    def measure(self, cases: Cases) -> dict[str, float]:
        """AUC and GAUC of binary tasks, RMSE and R2 of others, on the rows that the cases ask for; see `learn.scores`.

        Warns where AUC cannot be told: a task whose labels are all of one class.
        """
        log = cases.log
        rows, bounds = flat_rows(cases.stop, cases.target_stop)
        case = np.repeat(np.arange(len(cases)), np.diff(bounds))
        label = labels_of(log, self.tasks)[rows]
        table = TaskTable(
            "cases", np.zeros((len(rows), 0), np.int64), (), (), label, self.tasks, log.user[rows].astype(np.int64)
        )
        predicted = []
        self.learner.eval()
        for first in range(0, len(rows), PAIRS):
            at = slice(first, first + PAIRS)
            owner = case[at]
            pairs = pairs_of(log, rows[at], cases.user[owner], cases.start[owner], self.config.history_length)
            predicted.append(self._predict(pairs))
        found = scores(torch.cat(predicted).numpy(), table)
        for task, binary, labels in zip(self.tasks, self.learner.binary, label.T, strict=True):
            if binary and f"AUC {task}" not in found:
                some = np.unique(labels[~np.isnan(labels)])
                what = f"are all {some[0]:.0f}" if len(some) else "are all unknown"
                warnings.warn(
                    f"AUC {task} is missing, and not in the mean: its {len(labels)} labels {what}", stacklevel=2
                )
        return found

    def _predict(self, pairs: Pairs) -> Tensor:
        device = self.learner.mean.device
        return self.learner.predict(Pairs(*(each.to(device) for each in pairs))).cpu()

    def predict(self, queries: Queries, items: NDArray[np.int64]) -> Tensor:
        """Each task for pairs of a query and an item `(B,)`: chances, or expected values, `(B, T)`."""
        self.learner.eval()
        return self._predict(self._pairs(queries, np.arange(len(queries)), items))

    def _pairs(self, queries: Queries, row: NDArray[np.int64], items: NDArray[np.int64]) -> Pairs:
        start, stop = queries.offsets[:-1][row], queries.offsets[1:][row]
        history = right_aligned(queries.item, start, stop, self.config.history_length, fill=-1)
        known = queries.user[row].astype(np.int64)
        scenario = getattr(queries, "scenario", None)
        context = np.zeros(len(row), np.int64) if scenario is None else scenario[row].astype(np.int64) + 1
        return Pairs(
            torch.from_numpy(np.where(known < self.sizes[0] - 1, known, -1) + 1),
            torch.from_numpy(items),
            torch.from_numpy(np.where(context < self.sizes[2], context, 0)),
            torch.from_numpy(history.astype(np.int64)),
        )

    def score(self, queries: Queries) -> Tensor:
        """The weighted mean over tasks of chances, and of values in standard units through a sigmoid."""
        self.learner.eval()
        weights = torch.tensor(self.config.weights or [1.0] * len(self.tasks))
        n, out = self.n_items, []
        for first in range(0, len(queries) * n, PAIRS):
            pair = np.arange(first, min(first + PAIRS, len(queries) * n))
            predicted = self._predict(self._pairs(queries, pair // n, pair % n))
            unit = torch.sigmoid((predicted - self.learner.mean.cpu()) / self.learner.spread.cpu())
            chance = torch.where(torch.tensor(self.learner.binary), predicted, unit)
            out.append(chance @ (weights / weights.abs().sum().clamp(min=1e-12)))
        return torch.cat(out).view(len(queries), n) if out else torch.zeros(0, n)

    def state(self) -> dict[str, Tensor]:
        """The network, and what it knows of fields and tasks."""
        names = torch.tensor(list("\n".join(self.tasks).encode()), dtype=torch.uint8)
        facts = {
            "tasks": names,
            "binary": torch.tensor(self.learner.binary),
            "sizes": torch.tensor(self.sizes),
        }
        learned = {name: value for name, value in self.learner.state_dict().items() if name != EXTRA}
        return {**learned, **{f"fact.{name}": tensor for name, tensor in facts.items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take it back."""
        self.tasks = tuple(bytes(state["fact.tasks"].tolist()).decode().split("\n"))
        self.sizes = [int(size) for size in state["fact.sizes"]]
        attributes = state["network.attributes"]
        network = Ranker(self.sizes, attributes, len(self.tasks), self.config)
        label = np.tile(np.array([[0.0], [1.0]], np.float32), (1, len(self.tasks)))
        self.learner = Learner(network, TaskTable("", np.zeros((2, 0), np.int64), (), (), label, self.tasks))
        self.learner.binary = tuple(bool(each) for each in state["fact.binary"])
        learned = {name: value for name, value in state.items() if not name.startswith("fact.")}
        self.learner.load_state_dict({**learned, EXTRA: self.learner.get_extra_state()})
        self.learner.eval()


def labels_of(log: Interactions, tasks: tuple[str, ...]) -> NDArray[np.float32]:
    """The feedback of tasks `(n, T)`."""
    return np.stack([log.feedback[task] for task in tasks], 1)


def attributes_of(split: Split) -> tuple[Tensor, list[int]]:
    """Codes `(N, A)` of the items' attributes of one value each, 0 where missing, and how many codes each has."""
    import polars as pl

    catalog, codes, sizes = split.dataset.catalog, [], []
    for name, role in catalog.roles.items():
        if role != "category" or catalog.table[name].dtype.is_nested():
            continue
        column = catalog.table[name].cast(pl.String)
        code = column.rank("dense").fill_null(0).to_numpy().astype(np.int64)
        codes.append(code)
        sizes.append(int(code.max(initial=0)) + 1)
    n = split.train.n_items
    return torch.from_numpy(np.stack(codes, 1) if codes else np.zeros((n, 0), np.int64)), sizes
