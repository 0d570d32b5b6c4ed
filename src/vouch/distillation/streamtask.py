"""One API of a stream being learned: generator steps that look for disagreement, model steps that learn the answers."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vouch.distillation.apis import Api
from vouch.distillation.generators import around, gap, imbalance, likeness, unit_directions, zeroth_order
from vouch.distillation.memory import Reservoir
from vouch.distillation.similarity import dissimilarity, evaluating
from vouch.errors import TrainingError
from vouch.training.devices import seed_of

if TYPE_CHECKING:
    from vouch.distillation.apistream import APIStream


class Task:
    """What is needed while one API is learned, and dropped after.

    Attributes:
        step: steps done. planned: steps that iterations and budget allow; answers are kept for the memory from half of
            them on. low: the last model steps in a row whose answers had collapsed. stopped: why it ended.
        old: the features as they were before this API, where similarity to them counts.
        raw, raw_answers: real inputs, and what the API said to them.
    """

    def __init__(
        self, stream: APIStream, name: str, columns: Sequence[int], raw: Tensor | None, old: nn.Module | None
    ) -> None:
        """Fresh generators, optimizers and reservoir for an API that answers for the outputs `columns`."""
        config, device = stream.config, stream.device
        self.stream, self.config, self.name, self.device = stream, config, name, device
        self.columns = torch.tensor(columns, device=device)
        stream.head.to(device)
        self.generators = stream.make_generators().to(device).train()
        own = [p for p in (*stream.features.parameters(), *stream.head.parameters()) if p.requires_grad]
        theirs = list(self.generators.parameters())
        self.own_optimizer: torch.optim.Optimizer
        if config.optimizer == "adam":
            self.own_optimizer = torch.optim.Adam(
                own, config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
        else:
            self.own_optimizer = torch.optim.SGD(
                own, config.learning_rate, momentum=0.9, weight_decay=config.weight_decay
            )
        self.generator_optimizer = (
            torch.optim.Adam(theirs, config.generator_learning_rate, fused=True) if theirs else None
        )
        self.old = None if old is None else old.requires_grad_(False).eval()
        self.reservoir = Reservoir(config.memory, stream.shape, len(columns), device)
        self.raw = torch.empty(0, *stream.shape, device=device) if raw is None else raw.to(device, torch.float32)
        self.raw_answers = torch.empty(0, len(columns), device=device)
        self.step = self.low = self.planned = 0
        self.stopped = "finished"

    @classmethod
    def begin(cls, stream: APIStream, api: Api, names: Sequence[str], raw: Tensor | None) -> Task:
        """Extend the head by an API's classes, called `names`, and start."""
        remembers = stream.config.similarity > 0 and any(len(inputs) for inputs, _ in stream.memory)
        old = copy.deepcopy(stream.features) if remembers else None
        task = cls(stream, api.name, stream.head.grow(names), raw, old)
        cost, left = stream.round_cost(raw), stream.ledger.left(api) - len(task.raw)
        task.planned = min(stream.config.iterations, left // cost if cost else sys.maxsize) * task.a_round
        return task

    @property
    def a_round(self) -> int:
        """Steps of one round."""
        return self.config.model_steps + (self.config.queries == "generators")

    def rounds(self, api: Api, seed: int) -> Iterator[dict[str, float]]:
        """Do all steps that are left; yields what to log, once a round.

        A step asks before it changes anything, and is seeded by its number: one that was not answered can be done
        again later, and then equals one that was answered at once.
        """
        config, number, total = self.config, len(self.stream.apis), self.config.iterations * self.a_round
        row: dict[str, float] = {}
        while len(self.raw) > (done := len(self.raw_answers)):  # one request each, so that no answer is lost
            answers = api.ask(self.raw[done : done + api.max_rows], "raw", self.stream.ledger)
            self.raw_answers = torch.cat([self.raw_answers, answers])
            if not len(answers):  # failed requests took the budget
                self.raw = self.raw[:done]
        while self.step < total:
            if config.queries != "raw" and not self.stream.ledger.left(api):
                self.stopped = "budget"
                break
            if self.low >= config.collapse_patience:
                self.stopped = "collapsed"
                break
            if self.step == self.planned // 2:
                self.reservoir.clear()
            self._seed(seed, number, self.step)
            searches = config.queries == "generators" and self.step % self.a_round == 0
            row |= self.generator_step(api) if searches else self.model_step(api, self.step / self.planned)
            self.step += 1
            if self.step % self.a_round == 0:
                yield row
                row = {}
        if row:  # a round that the budget cut short
            yield row
        self._seed(seed, number, total)

    def kept(self) -> tuple[Tensor, Tensor]:
        """The memory of this API: inputs and recorded answers; real inputs have a share of it."""
        config = self.config
        share = 1.0 if config.queries == "raw" else config.raw_share
        real = torch.randperm(len(self.raw), device=self.device)[: round(share * config.memory)]
        room = config.memory - len(real)
        return (
            torch.cat([self.raw[real], self.reservoir.inputs[:room]]),
            torch.cat([self.raw_answers[real], self.reservoir.answers[:room]]),
        )

    def make_up(self, n: int) -> list[Tensor]:
        """`n` pictures before the tanh, an even part from each generator."""
        count = len(self.generators)
        parts = [n // count + (at < n % count) for at in range(count)]
        return [
            generator(torch.randn(part, self.config.latent, device=self.device))
            for generator, part in zip(self.generators, parts, strict=True)
            if part
        ]

    def generator_step(self, api: Api) -> dict[str, float]:
        """Phase 1: the generators move to where the API and the own network disagree."""
        config, features_of, head = self.config, self.stream.features, self.stream.head
        m, ledger = config.directions, self.stream.ledger
        n = min(config.batch_size, ledger.left(api) // (m + 1))
        if n < len(self.generators) or self.generator_optimizer is None:
            return {}  # what is left of the budget goes to the own network
        parts = self.make_up(n)
        u, sizes = torch.cat(parts), [len(part) for part in parts]
        v = unit_directions(m, u)
        points = around(u.detach(), v, config.eps).tanh().flatten(0, 1)
        answers = api.ask(points, "generators", ledger)
        if len(answers) < len(points):
            return {}  # failed requests took the rest of the budget
        answers = answers.view(m + 1, n, -1)
        with evaluating(features_of):
            features = features_of(u.tanh())
            logits = head(features)[:, self.columns]
            own: Tensor = logits.detach()
            if config.own_gradient == "estimated":
                with torch.no_grad():
                    own = head(features_of(points))[:, self.columns].view_as(answers)
        values = gap(own, answers, config.gap)
        # The estimate enters the graph as a fixed upstream gradient: raising this inner product raises the gap.
        rise = (u * zeroth_order(values, v, config.eps)).flatten(1).sum(1)
        if config.own_gradient == "exact":
            rise = rise + gap(logits, answers[0], config.gap)
        uneven = imbalance(logits)
        loss = config.balance * uneven - torch.stack([part.mean() for part in rise.split(sizes)]).sum()
        found = {"gap": values[0].mean().item(), "imbalance": uneven.item()}
        if len(sizes) > 1:
            groups = features.split(sizes)
            pairs = [likeness(a, b) for at, a in enumerate(groups) for b in groups[at + 1 :]]
            alike = torch.stack(pairs).mean()
            loss = loss + config.cooperation * alike
            found["likeness"] = alike.item()
        self._descend(loss, self.generator_optimizer)
        return found

    def model_step(self, api: Api, done: float) -> dict[str, float]:
        """Phase 2: the own network learns new answers and recorded ones, and stays similar to what it was."""
        config, features, head = self.config, self.stream.features, self.stream.head
        new, said, found = self._ask_new(api)
        x, p = new, said
        if real := self.stream.real_rows(self.raw):
            chosen = torch.randint(len(self.raw), (real,), device=self.device)
            x, p = torch.cat([x, self.raw[chosen]]), torch.cat([p, self.raw_answers[chosen]])
        batches = [(self.columns, x, p)]
        for columns, (inputs, recorded) in zip(head.groups, self.stream.memory, strict=False):
            if len(inputs):
                chosen = torch.randint(len(inputs), (config.replay,), device=self.device)
                batches.append((torch.tensor(columns, device=self.device), inputs[chosen], recorded[chosen]))
        sizes = [len(inputs) for _, inputs, _ in batches]
        together = torch.cat([inputs for _, inputs, _ in batches])
        features.train(len(together) > 1)  # one pass: batch-normalisation sees new and replayed inputs alike
        outputs = head(features(together)).split(sizes)
        gaps = [gap(out[:, c], p, config.gap).mean() for out, (c, _, p) in zip(outputs, batches, strict=True)]
        loss = torch.stack(gaps).sum()
        found["distillation"] = gaps[0].item()
        if len(gaps) > 1:
            found["replay"] = loss.item() - gaps[0].item()
        if self.old is not None:
            with evaluating(features):
                unlike = dissimilarity(features, self.old, self.stream.layers, together[sizes[0] :])
            loss = loss + config.similarity * unlike
            found["dissimilarity"] = unlike.item()
        for group in self.own_optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.3 ** sum(done >= at for at in config.decay_at)
        self._descend(loss, self.own_optimizer)
        self.reservoir.offer(new, said)  # drawn last, so that with or without a memory all else is the same
        return found

    def _ask_new(self, api: Api) -> tuple[Tensor, Tensor, dict[str, float]]:
        """New inputs `(b, C, H, W)`, their answers `(b, K)`, and how even and how sure those are."""
        config, ledger = self.config, self.stream.ledger
        n = min(config.batch_size - self.stream.real_rows(self.raw), ledger.left(api))
        if not n or config.queries == "raw":
            return self.raw[:0], self.raw_answers[:0], {}
        if config.queries == "generators":
            with torch.no_grad():
                x = torch.cat(self.make_up(n)).tanh()
        else:
            x = torch.rand(n, *self.stream.shape, device=self.device) * 2 - 1
        answers = api.ask(x, "model", ledger)
        mean = answers.mean(0)
        even, sure = float(torch.special.entr(mean).sum() / math.log(len(mean))), float(answers.amax(1).mean())
        self.low = self.low + 1 if config.queries == "generators" and even < config.collapse else 0
        return x[: len(answers)], answers, {"entropy": even, "confidence": sure}

    def _seed(self, *numbers: int) -> None:
        # torch.manual_seed keeps a stack trace for every GPU that may come, which costs more than a small step.
        torch.default_generator.manual_seed(seed_of(*numbers))
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed_of(*numbers))

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        if not bool(torch.isfinite(loss)):
            raise TrainingError(
                f"the loss is {loss.item()} at API {self.name!r}, step {self.step}", hint="lower learning_rate"
            )
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
