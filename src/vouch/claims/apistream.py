"""The claims of learning from a stream of APIs (arXiv 2309.00023): one network takes in services without their data.

Protocol of all: the classes of a picture collection are taken in pairs, and a network of one of two architectures is
trained on each pair; it becomes a service that answers with probabilities and has a budget. One further network then
learns from the services, one after the other. Test pictures are answered once, after each service. All ways have the
same first weights, as many steps of that network and, where inputs are made up, as many queries: noise gets what the
search of the generators costs as larger batches. Nothing is chosen, so that there is no validation part.

Accuracy is the mean over services after the last one: task-incremental (`task`) among a service's own classes,
class-incremental (`classes`) among all. Which of them the paper reports is not known; both stand in the details.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vouch.claims.claim import Claim, Measurement, Scale, register_claim
from vouch.data.images import read_images
from vouch.distillation.apis import Api, network_service
from vouch.distillation.apistream import APIStream, StreamReport
from vouch.distillation.similarity import evaluating
from vouch.training import Run, seeded
from vouch.training.devices import seed_of

if TYPE_CHECKING:
    from vouch.data.images import Images

BUDGET: dict[str, dict[str, Any]] = {
    "smoke": {"iterations": 8, "model_steps": 4, "batch_size": 32, "learning_rate": 3e-3, "memory": 100},
    "desk": {},
    "full": {
        "generator": "conv",
        "generator_width": 64,
        "latent": 256,
        "iterations": 1116,
        "model_steps": 5,
        "batch_size": 256,
        "directions": 1,
        "eps": 1e-3,
        "generator_learning_rate": 1e-4,
    },
}
"""Settings other than the defaults; at `full` two million queries of each service."""
EPOCHS = {"smoke": 10, "desk": 10, "full": 40}
"""Of the services' own training."""
FEW = 0.02
"""Share of the real pictures that a data-efficient way has, at least 4 of each service."""
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "noise": {"queries": "noise"},
    "sequential": {"generators": 1, "memory": 0, "similarity": 0.0},
    "one generator": {"generators": 1, "similarity": 0.0},
    "no similarity": {"similarity": 0.0},
    "few real": {"queries": "raw"},
    "data-efficient": {},
    "real": {"queries": "raw"},
}
REAL = {"few real": FEW, "data-efficient": FEW, "real": 1.0}
"""Share of real pictures, without labels, that a way has."""
NAMES = {
    "full": "two generators, memory, similarity, no data",
    "noise": "uniform noise, memory, similarity",
    "sequential": "one generator, nothing against forgetting",
    "one generator": "one generator, memory",
    "no similarity": "two generators, memory",
    "few real": "2 % of the real pictures, without labels",
    "data-efficient": "two generators and 2 % of the real pictures, without labels",
    "classic": "all real pictures with labels, one pair after the other, with replay",
}


@dataclass(frozen=True)
class Schools:
    """Services, and the real pictures by service: of training `(inputs, labels)`, of the test, and services' accuracy."""

    apis: list[Api]
    train: dict[str, tuple[Tensor, Tensor]]
    test: dict[str, tuple[Tensor, Tensor]]
    accuracy: dict[str, float]

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        return self.apis[0].shape


def classifier(shape: tuple[int, int, int], classes: int, *, convolutions: bool) -> nn.Module:
    """One of the two architectures of services."""
    body: list[nn.Module] = [nn.Flatten(), nn.Linear(math.prod(shape), 128), nn.ReLU()]
    if convolutions:
        first, second = nn.Conv2d(shape[0], 16, 3, 2, 1), nn.Conv2d(16, 32, 3, 2, 1)
        body = [first, nn.ReLU(), second, nn.ReLU(), nn.Flatten()]
    with torch.no_grad():
        width = nn.Sequential(*body)(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(*body, nn.Linear(width, classes))


def own_features(shape: tuple[int, int, int], scale: Scale) -> nn.Module:
    """The network that learns from all, up to its features: an MLP, or at `full` convolutions with group norm."""
    if scale != "full":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU())
    layers: list[nn.Module] = []
    for before, after in ((shape[0], 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())


def schools(images: Images, scale: Scale, seed: int) -> Schools:
    """Train a service for every two classes; an odd one out joins the last pair."""
    count, groups = len(images.classes), [list(range(at, at + 2)) for at in range(0, len(images.classes) - 1, 2)]
    groups[-1] = list(range(groups[-1][0], count))
    parts = [(part.tensor() * 2 - 1, torch.from_numpy(part.label)) for part in (images.train, images.test)]
    found = Schools([], {}, {}, {})
    for k, group in enumerate(groups):
        name, rank = "+".join(images.classes[c] for c in group), {c: at for at, c in enumerate(group)}
        both = []
        for x, y in parts:
            mine = torch.isin(y, torch.tensor(group))
            both.append((x[mine], torch.tensor([rank[int(c)] for c in y[mine]])))
        (x, y), (xt, yt) = both
        shape = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
        with seeded(seed_of(seed, k)):
            network = classifier(shape, len(group), convolutions=k % 2 == 1)
            optimizer = torch.optim.Adam(network.parameters(), 1e-3)
            for _ in range(EPOCHS[scale]):
                for rows in torch.randperm(len(x)).split(64):
                    _step(optimizer, F.cross_entropy(network(x[rows]), y[rows]))
        service = network_service(network)
        found.apis.append(Api(service, tuple(images.classes[c] for c in group), shape, name))
        found.train[name], found.test[name] = (x, y), (xt, yt)
        right = torch.from_numpy(service(xt.numpy())).argmax(1) == yt
        found.accuracy[name] = right.double().mean().item()
    return found


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def learn(made: Schools, scale: Scale, seed: int, way: str) -> StreamReport:
    """One way to learn from the services; each gives no more rows than the data-free method asks for."""
    with seeded(seed_of(seed, 100)):
        features = own_features(made.shape, scale)
    settings = {**BUDGET[scale], **WAYS[way]}
    whole = APIStream(features, made.shape, **BUDGET[scale])
    round_cost, config = whole.round_cost(None), whole.config
    if way == "noise":
        settings["batch_size"] = -(-round_cost // config.model_steps)
    raw = None
    if way in REAL:
        raw = {}
        for name, (x, _) in made.train.items():
            chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            raw[name] = x[chosen[: max(4, round(REAL[way] * len(x)))]]
    apis = []
    for api in made.apis:
        limit = max(config.iterations * round_cost, 0 if raw is None else len(raw[api.name]))
        apis.append(Api(api.service, api.classes, api.shape, api.name, budget=limit))
    return APIStream(features, made.shape, **settings).learn(apis, raw=raw, tests=made.test, run=Run(seed=seed))


def on_labels(made: Schools, scale: Scale, seed: int, *, joint: bool) -> StreamReport:
    """The same network on real pictures with labels, for as many steps: all at once, or pair after pair with replay.

    Replay is what is usual in class-incremental learning: as many remembered pictures of each earlier pair in a step
    as the stream replays, out of as many as it keeps, and one cross-entropy over all classes seen so far.
    """
    with seeded(seed_of(seed, 100)):
        features = own_features(made.shape, scale)
        model = APIStream(features, made.shape, **BUDGET[scale])
    config, names = model.config, [api.name for api in made.apis]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.device, steps = device, config.iterations * config.model_steps
    begins, at = {}, 0
    for api in made.apis:
        begins[api.name], at = at, at + len(api.classes)
    pool = {name: (x.to(device), (y + begins[name]).to(device)) for name, (x, y) in made.train.items()}
    task: list[list[float | None]] = []
    classes: list[list[float | None]] = []
    with seeded(seed_of(seed, 200)):
        for k, group in enumerate([made.apis] if joint else [[api] for api in made.apis]):
            for api in group:
                model.head.grow(list(api.classes))
                model.apis.append(api.name)
            model.to(device).train()
            optimizer = torch.optim.Adam(model.parameters(), config.learning_rate)
            now = [pool[api.name] for api in group]
            x, y = (torch.cat(part) for part in zip(*now, strict=True))
            for _ in range(steps * len(group)):
                batches = [_drawn(x, y, config.batch_size)]
                batches += [_drawn(*pool[name], config.replay) for name in names[: 0 if joint else k]]
                inputs, labels = (torch.cat(part) for part in zip(*batches, strict=True))
                _step(optimizer, F.cross_entropy(model(inputs), labels))
            for api in group:  # what is remembered
                kept = torch.randperm(len(pool[api.name][1]), device=device)[: config.memory]
                pool[api.name] = (pool[api.name][0][kept], pool[api.name][1][kept])
            with evaluating(model):
                rows = [model.accuracy(name, *made.test[name]) for name in model.apis]
            task.append([row[0] for row in rows])
            classes.append([row[1] for row in rows])
    return StreamReport(list(model.apis), ["finished"] * len(model.apis), task, classes, ledger=[])


def _drawn(x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    chosen = torch.randint(len(y), (n,), device=y.device)
    return x[chosen], y[chosen]


def summary(report: StreamReport) -> dict[str, Any]:
    """The numbers of one way: accuracies, forgetting, the accuracy after each service, and what it asked."""
    return {
        "task": report.average(report.task),
        "classes": report.average(report.classes),
        "task_forgetting": report.forgetting(report.task),
        "classes_forgetting": report.forgetting(report.classes),
        "task_matrix": report.task,
        "stopped": report.stopped,
        "queries": sum(row["queries"] for row in report.ledger),
        "seconds": round(report.seconds, 1),
    }


class _StreamClaim(Claim):
    slug: ClassVar[str] = "apistream"
    metric = "task-incremental accuracy"
    data = {"smoke": "drawn", "desk": "usps", "full": "cifar10_10k"}
    reported = "paper: names this part among what it gains by (its tables could not be confirmed)"
    value: ClassVar[Literal["task", "classes", "task_forgetting", "classes_forgetting"]] = "task"
    sides: ClassVar[tuple[str, str]] = ("sequential", "full")
    share: ClassVar[float] = 1.0
    """The effect is the method's value less this share of the baseline's; for forgetting, the other way round."""

    def read(self, source: str) -> Images:
        """Labelled pictures."""
        return read_images(source)

    def ways(self, made: Schools, scale: Scale, seed: int) -> dict[str, StreamReport]:
        """All that is run, the two sides first."""
        return {way: learn(made, scale, seed, way) for way in self.sides}

    def measure(self, dataset: Images, scale: Scale, seed: int) -> Measurement:
        """Train services, learn from them in all ways, and compare two."""
        made = schools(dataset, scale, seed)
        found = {way: summary(report) for way, report in self.ways(made, scale, seed).items()}
        low, high = (found[way][self.value] for way in self.sides)
        effect = low - high if self.value.endswith("forgetting") else high - self.share * low
        return Measurement(low, high, effect, details={"services": made.accuracy, **found})


@register_claim
class Comparable(_StreamClaim):
    """Without data, against continual learning on all data with labels; the bounds stand beside it."""

    variant = "comparable"
    statement = "Without any data, accuracy is at least 0.95 of classic continual learning's on all data with labels."
    effect = "method less 0.95 of the baseline"
    baseline = NAMES["classic"]
    method = NAMES["full"]
    reported = "paper: data-free, comparable with classic continual learning on full raw data on MNIST and SVHN"
    sides = ("classic", "full")
    share = 0.95

    def ways(self, made: Schools, scale: Scale, seed: int) -> dict[str, StreamReport]:
        """The two sides; real inputs asked about without labels, and all labels at once, as upper bounds."""
        return {
            "classic": on_labels(made, scale, seed, joint=False),
            "full": learn(made, scale, seed, "full"),
            "real": learn(made, scale, seed, "real"),
            "joint": on_labels(made, scale, seed, joint=True),
        }


@register_claim
class Noise(_StreamClaim):
    """Are generators worth their queries?"""

    variant = "noise"
    statement = "For as many queries, generators give a higher accuracy than uniform noise."
    baseline = NAMES["noise"]
    method = NAMES["full"]
    sides = ("noise", "full")


@register_claim
class Sequential(_StreamClaim):
    """All parts together against none."""

    variant = "sequential"
    statement = "The whole method has a higher accuracy than one generator with nothing against forgetting."
    baseline = NAMES["sequential"]
    method = NAMES["full"]
    sides = ("sequential", "full")


@register_claim
class Classes(Sequential):
    """The same, where classes of different services must be told apart."""

    variant = "classes"
    statement = "The same among all classes: the whole method has a higher class-incremental accuracy."
    metric = "class-incremental accuracy"
    value = "classes"


@register_claim
class Memory(_StreamClaim):
    """The memory alone."""

    variant = "memory"
    statement = "With one generator, replaying recorded answers lowers forgetting."
    metric = "forgetting of task-incremental accuracy"
    effect = "baseline less method"
    baseline = NAMES["sequential"]
    method = NAMES["one generator"]
    value = "task_forgetting"
    sides = ("sequential", "one generator")


@register_claim
class Generators(_StreamClaim):
    """The second generator alone."""

    variant = "generators"
    statement = "With a memory, two cooperating generators give a higher accuracy than one, for as many queries."
    baseline = NAMES["one generator"]
    method = NAMES["no similarity"]
    sides = ("one generator", "no similarity")


@register_claim
class Similarity(_StreamClaim):
    """The similarity term alone."""

    variant = "similarity"
    statement = "With two generators and a memory, the similarity to the network before raises accuracy."
    baseline = NAMES["no similarity"]
    method = NAMES["full"]
    sides = ("no similarity", "full")


@register_claim
class DataEfficient(_StreamClaim):
    """A few real pictures, with and without generators."""

    variant = "data-efficient"
    statement = "With 2 % of the real pictures, adding generators gives a higher accuracy than these pictures alone."
    baseline = NAMES["few real"]
    method = NAMES["data-efficient"]
    reported = "paper: data-efficient reaches 0.97, 0.75, 0.69 of classic learning on CIFAR-10, CIFAR-100, MiniImageNet"
    sides = ("few real", "data-efficient")
