"""What the claims about several tasks share: tables, one way to train on them, and what they are measured by.

Rows are cut 60/20/20 at random with the seed; codes come from training rows. Every side has the same network (shared
bottom 64-32, towers 16, fields of 8), batches of 512, at most 12 epochs, and the epoch with the best mean validation
AUC. Where a side has settings to choose, validation chooses, and all sides choose among as many. The penalty of 1e-5 is
decoupled weight decay, once for everybody, and next to nothing: best epochs are what keeps networks from overfitting.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from vouch.claims.claim import Claim, Measurement, Scale
from vouch.data import Dataset
from vouch.data.readers import find_source, read
from vouch.errors import DataError
from vouch.multitask.adatask import AUMeter
from vouch.multitask.learn import Learner, TableBatches, learn, predict, scores
from vouch.multitask.table import TaskTable
from vouch.multitask.towers import FieldNetwork
from vouch.training import Run, TrainConfig, seeded

RARE = 0.1
"""Share of positives below which a task counts as sparse."""
USER_FIELDS = (
    "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range", "fans_user_num_range",
    "friend_user_num_range", "register_days_range", *(f"onehot_feat{number}" for number in (0, 1, 2, 4, 5, 6, 7)),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Tables:
    """Rows before they are cut: inputs and labels by name, `least` as `TaskTable.of` takes it."""

    name: str
    inputs: Mapping[str, NDArray[Any]]
    labels: Mapping[str, NDArray[Any]]
    group: NDArray[np.int64] | None = None
    least: Mapping[str, int] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of names and values."""
        digest = hashlib.sha256()
        for name, column in {**self.inputs, **self.labels}.items():
            digest.update(name.encode())
            digest.update("\x1f".join(map(str, column.tolist())).encode())
        return digest.hexdigest()

    def parts(self, seed: int) -> tuple[TaskTable, TaskTable, TaskTable]:
        """60/20/20 of the rows at random; codes from the training rows."""
        n = len(next(iter(self.labels.values())))
        order = np.random.default_rng(seed).permutation(n)
        train, valid, test = (np.sort(each) for each in np.split(order, [int(0.6 * n), int(0.8 * n)]))
        seen = np.zeros(n, dtype=bool)
        seen[train] = True
        table = TaskTable.of(self.inputs, self.labels, train=seen, least=self.least, group=self.group, name=self.name)
        return table.rows(train), table.rows(valid), table.rows(test)


def read_tables(source: str) -> Tables:
    """KuaiRand's liked exposures, the Adult census, or any interaction log with feedback.

    Raises:
        DataError: the log has no feedback.
    """
    if source == "world":
        return from_log(read(source))
    folder = find_source(source)
    if (folder / "adult_train.csv.gz").exists():
        return _adult(folder)
    if (folder / "users.csv").exists() and (folder / "log.csv.gz").exists():
        return _kuairand(folder)
    return from_log(read(source))


def from_log(dataset: Dataset) -> Tables:
    """The rows of a log with feedback: user, item, the item's categories, scenario and hour; values become labels.

    Raises:
        DataError: there is no feedback, a single signal, or none of 0 and 1.
    """
    log, catalog = dataset.interactions, dataset.catalog
    if not log.feedback:
        raise DataError(
            f"{dataset.name} has no feedback, which claims about several tasks need",
            hint="name its columns when preparing the data: --columns feedback=click+like",
        )
    binary = [np.isin(values[~np.isnan(values)], (0, 1)).all() for values in log.feedback.values()]
    if len(binary) < 2 or not any(binary):
        raise DataError(
            f"{dataset.name} has the feedback {', '.join(log.feedback)}",
            hint="claims about several tasks need two signals or more, and one of them of 0 and 1",
        )
    inputs: dict[str, NDArray[Any]] = {"user": log.user, "item": log.item}
    for name, role in catalog.roles.items():
        if role == "category" and not catalog.table[name].dtype.is_nested():
            inputs[name] = catalog.table[name].cast(pl.String).fill_null("").to_numpy()[log.item]
    if log.scenario is not None:
        inputs["scenario"] = log.scenario
    if log.time is not None:
        inputs["hour"] = log.time // 3600 % 24
    return Tables(dataset.name, inputs, dict(log.feedback), log.user.astype(np.int64), {"user": 3, "item": 3})


def _kuairand(folder: Path) -> Tables:
    rows = pl.read_csv(folder / "log.csv.gz").unique(
        ["user_id", "video_id", "time_ms"], keep="first", maintain_order=True
    )
    rows = rows.filter(pl.col("is_like") == 1)
    people = pl.read_csv(folder / "users.csv", infer_schema=False).with_columns(pl.col("user_id").cast(pl.Int64))
    rows = rows.join(people.select("user_id", *USER_FIELDS), on="user_id", how="left", maintain_order="left")
    day = pl.col("date").cast(pl.String).str.to_date("%Y%m%d").dt.weekday()
    # a code for "unknown" (0), and one for each doubling of the duration
    duration = (pl.col("duration_ms").clip(1) / 1000).log(2).floor().clip(-1, 10).cast(pl.Int64)
    rows = rows.with_columns(
        hour=pl.col("hourmin") // 100,
        weekday=day,
        duration=pl.when(pl.col("duration_ms") == 0).then(-2).otherwise(duration),
        follow_or_forward=(pl.col("is_follow") + pl.col("is_forward") > 0).cast(pl.Int8),
    )
    inputs = ("user_id", "video_id", "hour", "weekday", "duration", *USER_FIELDS)
    labels = {
        "click": "is_click", "long_view": "long_view", "profile_enter": "is_profile_enter", "comment": "is_comment",
        "follow_or_forward": "follow_or_forward",
    }  # fmt: skip
    return Tables(
        "kuairand_explicit (liked)",
        {name: rows[name].to_numpy() for name in inputs},
        {task: rows[column].to_numpy() for task, column in labels.items()},
        rows["user_id"].to_numpy(),
        {"video_id": 3},
    )


def _adult(folder: Path) -> Tables:
    rows = pl.concat(
        [pl.read_csv(folder / f"adult_{part}.csv.gz", infer_schema_length=None) for part in ("train", "test")]
    )
    labels = rows.select(
        income=pl.col("income").str.starts_with(">50K"),
        never_married=pl.col("marital_status") == "Never-married",
        college=pl.col("education_num") >= 13,
        long_hours=pl.col("hours_per_week") > 40,
        capital_gain=pl.col("capital_gain") > 0,
        capital_loss=pl.col("capital_loss") > 0,
    ).cast(pl.Int8)
    inputs = rows.select(pl.col("age") // 5, "workclass", "occupation", "race", "sex", "native_country")
    return Tables(
        "adult_census",
        {name: inputs[name].to_numpy() for name in inputs.columns},
        {name: labels[name].to_numpy() for name in labels.columns},
    )


@dataclass(frozen=True)
class Side:
    """One way to train: a balancer, its settings, the learning rates it may choose among, its network and optimizer."""

    balancer: str = "uniform"
    settings: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (2e-3, 1e-3)
    architecture: str = "shared-bottom"
    optimizer: str = "adam"


@dataclass
class Trained:
    """What came of it: test metrics, validation AUC, the learning rate, seconds a step, and what was trained."""

    test: dict[str, float]
    valid: float
    rate: float
    seconds: float
    meter: AUMeter | None = None
    told: dict[str, Any] = field(default_factory=dict)


Parts = tuple[TaskTable, TaskTable, TaskTable]


def train(parts: Parts, side: Side, scale: Scale, seed: int, *, metered: bool = False) -> Trained:
    """One side, at each of its learning rates; validation chooses."""
    rates = side.rates[:1] if scale == "smoke" else side.rates
    return max((_once(parts, side, rate, scale, seed, metered) for rate in rates), key=lambda found: found.valid)


def network(table: TaskTable, side: Side, seed: int) -> FieldNetwork:
    """The network of a side, before training."""
    with seeded(seed):
        return FieldNetwork(
            table.sizes,
            len(table.tasks),
            embedding_size=8,
            architecture=side.architecture,
            bottom=(64, 32),
            tower=(16,),
            dropout=0.2,
        )


def _once(parts: Parts, side: Side, rate: float, scale: Scale, seed: int, metered: bool) -> Trained:
    table, valid, test = parts
    learner = Learner(network(table, side, seed), table)
    kept: dict[str, Any] = {}
    meter = AUMeter(learner.named_parameters(), table.tasks) if metered else None
    monitor = "AUC" if any(table.binary) else "R2"
    config = TrainConfig(
        epochs=2 if scale == "smoke" else 12,
        batch_size=512,
        learning_rate=rate,
        weight_decay=1e-5,
        monitor=monitor,
        patience=12,
    )
    batches, start = TableBatches(table, config.batch_size), time.perf_counter()
    report = learn(
        learner,
        batches,
        config,
        Run(seed=seed),
        balancer=side.balancer,
        optimizer=side.optimizer,
        settings=dict(side.settings),
        validate=lambda: scores(predict(learner, valid), valid),
        meter=meter,
        tell=kept,
    )
    seconds = (time.perf_counter() - start) / max(1, report.epochs * len(batches))
    on_valid, on_test = (scores(predict(learner, part), part) for part in (valid, test))
    return Trained(on_test, on_valid[monitor], rate, seconds, meter, kept)


def alone(parts: Parts, scale: Scale, seed: int) -> dict[str, float]:
    """Test metrics of one network a task, each as large as the shared one and with its own learning rate."""
    found: dict[str, float] = {}
    for task in parts[0].tasks:
        table, valid, test = (part.only(task) for part in parts)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "there is one task")
            result = train((table, valid, test), Side(), scale, seed).test
        found |= {name: value for name, value in result.items() if name.endswith(f" {task}")}
    return found | means(found)


def means(found: Mapping[str, float], tasks: Sequence[str] | None = None) -> dict[str, float]:
    """`AUC` and `GAUC`: means over tasks, all or some."""
    result = {}
    for name in ("AUC", "GAUC"):
        values = (
            [found[f"{name} {task}"] for task in tasks]
            if tasks is not None and f"{name} {tasks[0]}" in found
            else [value for key, value in found.items() if key.startswith(f"{name} ")]
        )
        known = [value for value in values if not np.isnan(value)]
        if known:
            result[name] = float(np.mean(known))
    return result


def sparse(table: TaskTable) -> list[str]:
    """The tasks with few positives; the rarest, if none has few."""
    rate = np.nanmean(table.label, 0)
    rates = {task: float(r) for task, r, binary in zip(table.tasks, rate, table.binary, strict=True) if binary}
    return [task for task, r in rates.items() if r < RARE] or [min(rates, key=rates.__getitem__)]


class Tasks(Claim):
    """A claim that sets one way of training on several tasks against another.

    Attributes:
        sides: baseline and method. others: further ways whose numbers go into the details.
        judged: tasks whose mean AUC is the metric: `all` or `sparse`.
    """

    data: ClassVar[Mapping[str, str]] = {"smoke": "world", "desk": "kuairand_explicit", "full": "kuairand_explicit"}
    sides: ClassVar[tuple[Side, Side]]
    others: ClassVar[Mapping[str, Side]] = {}
    with_single: ClassVar[bool] = False
    judged: ClassVar[str] = "all"
    metric = "mean test AUC over tasks"

    def read(self, source: str) -> Tables:
        """Tables of tasks."""
        return read_tables(source)

    def measure(self, dataset: Any, scale: Scale, seed: int) -> Measurement:
        """Train both sides, and the others for the record."""
        parts = dataset.parts(seed)
        low, high = (train(parts, side, scale, seed) for side in self.sides)
        details = {"baseline": told(low), "method": told(high), "step_ratio": high.seconds / low.seconds}
        for name, side in self.others.items():
            details[name] = told(train(parts, side, scale, seed))
        if self.with_single:
            details["single"] = alone(parts, scale, seed)
        tasks = list(parts[0].tasks) if self.judged == "all" else sparse(parts[0])
        tasks = [task for task in tasks if f"AUC {task}" in low.test]
        a, b = (means(found.test, tasks)["AUC"] for found in (low, high))
        return Measurement(a, b, b - a, details={**details, "tasks": tasks})


def told(found: Trained) -> dict[str, Any]:
    """What goes into the details of one side."""
    return {**found.test, "learning_rate": found.rate, "seconds_per_step": found.seconds}
