"""Sequential recommenders as teachers: finding them, asking them at every position, and letting them answer together.

Shapes: `B` batch, `T` positions, `D` hidden size, `K` interests, `n` positions learned from, `N` items.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vouch import registry
from vouch.config import Config
from vouch.data import Queries, Split
from vouch.distillation.taps import mixture
from vouch.errors import ConfigError
from vouch.nn.transformer import Block, Context
from vouch.recommenders import Recommender
from vouch.recommenders.base import load
from vouch.recommenders.sequential.base import SequenceEncoder, SequentialRecommender
from vouch.registry import Card
from vouch.training import FitReport, Run

INHERITED = (
    *("hidden_size", "max_length", "dropout", "every_window", "negatives"),
    *("epochs", "batch_size", "learning_rate", "monitor", "patience", "evaluate_every"),
)
"""Settings that teachers trained here take from the student, where they have them."""


def find_teachers(names: Sequence[str], student: SequentialRecommender, split: Split, run: Run) -> list[Any]:
    """Trained teachers: those named by a method are trained on `split`, each with a seed of its own.

    Raises:
        ConfigError: there is none, or one cannot teach this student. UnknownIdError: there is no such method.
        StorageError: a folder holds no model.
    """
    if not names:
        raise ConfigError("there is no teacher", hint="name methods or folders: meal.teachers=sasrec,gru4rec")
    found: list[Any] = []
    for k, name in enumerate(names):
        path = Path(name)
        if path.exists() or len(path.parts) > 1:
            found.append(load(path / "model" if (path / "run.json").exists() else path))
            continue
        kind = registry.method(name)
        if not issubclass(kind, SequentialRecommender) or name == "meal":
            raise ConfigError(f"{name!r} cannot teach: it is no sequential method that learns from data")
        taken = {key: getattr(student.config, key) for key in INHERITED if key in kind.Config.model_fields}
        teacher = kind(**taken)
        folder = None if run.path is None else run.path / "teachers" / f"{k + 1}-{name}"
        # a prime apart, so that no two runs of a small series share one
        aside = Run(folder, run.seed + 10_007 * (k + 1), run.device, run.precision, run.resume, run.progress)
        teacher.fit(split, aside)
        found.append(teacher)
    check_teachers(found, student, split)
    return found


def check_teachers(teachers: Sequence[Any], student: SequentialRecommender, split: Split) -> None:
    """Refuse models that cannot teach this student at every position.

    Raises:
        ConfigError: which, and why.
    """
    if not teachers:
        raise ConfigError("there is no teacher", hint="give at least one trained model")
    for k, teacher in enumerate(teachers, start=1):
        name = f"teacher {k} ({teacher.card.slug})"
        if not isinstance(teacher, SequentialRecommender):
            raise ConfigError(f"{name} has no output at each position", hint="take sequential methods")
        if teacher.items != split.train.items:
            raise ConfigError(f"{name} was trained on other items", hint="train it on the same data and split")
        if teacher.config.max_length < student.config.max_length:
            reads, ours = teacher.config.max_length, student.config.max_length
            raise ConfigError(f"{name} reads {reads} items and the student {ours}", hint=f"set max_length={reads}")
        if looks_ahead(teacher.network):
            raise ConfigError(
                f"{name} looks ahead: its output at a position knows the items after it", hint="take another method"
            )


@torch.no_grad()
def looks_ahead(network: SequenceEncoder) -> bool:
    """Whether the output at a position depends on later items."""
    was_training, device = network.training, network.item.weight.device
    network.eval()
    items = torch.tensor([[0, 1, 0], [0, 1, 1]], device=device)
    lengths, user = torch.tensor([3, 3], device=device), torch.tensor([-1, -1], device=device)
    one, other = network(items, lengths, Context(user=user)).float()[:, :2]
    network.train(was_training)
    return not torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def score_items(encoder: SequenceEncoder, hidden: Tensor, items: Tensor | None = None) -> Tensor:
    """Scores `(n, N)` of all items, or of some, by vectors `(n, D)` or `(n, K, D)`."""
    table = encoder.item_vectors()
    table = table if items is None else table[items]
    scores = (hidden @ table.T).float()
    if scores.dim() == 3:
        scores = scores.amax(1) if encoder.merge == "max" else scores.sum(1)
    if encoder.bias is not None:
        scores = scores + (encoder.bias if items is None else encoder.bias[items])
    return scores


class Depths:
    """Makes an encoder leave the outputs of its blocks, `(B, T, D)` each, in the context of every pass that has one.

    The last block's is left out: it is the encoder's own output, but for a norm. `close` takes the hooks off, at the
    latest when this object goes.
    """

    def __init__(self, encoder: SequenceEncoder) -> None:
        blocks: list[nn.Module] = [module for module in encoder.modules() if isinstance(module, Block | nn.RNNBase)]
        self.blocks = [block for block in blocks if block is not blocks[-1] or isinstance(block, nn.RNNBase)]
        self.context: Context | None = None
        kept = weakref.ref(self)  # or the trained encoder would hold on to what is made for training only

        def enter(module: nn.Module, given: Any, named: Any) -> None:
            depths = kept()
            if depths is not None:
                depths.context = next((each for each in (*given, *named.values()) if isinstance(each, Context)), None)

        def leave(module: nn.Module, given: Any, output: Any) -> None:
            depths = kept()
            if depths is not None:
                depths.context = None

        def keep(number: int) -> Any:
            def hook(module: nn.Module, given: Any, output: Any) -> None:
                depths = kept()
                if depths is not None and depths.context is not None:
                    found = output[0] if isinstance(output, tuple) else output
                    depths.context.notes.setdefault(f"depth {number}", [found])

            return hook

        hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(self.blocks)]
        hooks += [encoder.register_forward_pre_hook(enter, with_kwargs=True), encoder.register_forward_hook(leave)]
        self.close = weakref.finalize(self, _remove, hooks)

    def pick(self, context: Context, last: Tensor, count: int) -> list[Tensor]:
        """`count` outputs of a pass, its `last` one and some before it, evenly spread; of a shallow network some twice."""
        outputs = [*(context.notes[f"depth {number}"][0] for number in range(len(self.blocks))), last]
        places = [-(-(j + 1) * len(outputs) // count) - 1 for j in range(count)]
        return [outputs[place] for place in places]


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


def at_positions(output: Tensor, at: Tensor) -> Tensor:
    """The vectors `(n, D)` at flat positions of `(B, T, D)`; interests `(B, T, K, D)` are averaged."""
    vectors = output.flatten(0, 1).index_select(0, at)
    return (vectors.mean(1) if vectors.dim() == 3 else vectors).float()


class Together(Recommender):
    """Trained models that answer together: the mean of their softmaxes over all items. Not a method to be trained."""

    card = Card("together", "Ensemble", "distillation", "the mean answer of several models", baseline=True)
    Config = Config

    def __init__(self, models: Sequence[Recommender]) -> None:
        super().__init__()
        if not models:
            raise ConfigError("an ensemble of no models gives no answer", hint="give at least one")
        self.models = list(models)
        first = self.models[0]
        self.items, self.users, self.popularity = first.items, first.users, first.popularity

    def score(self, queries: Queries) -> Tensor:
        """`(B, N)`, whose softmax is the mean of the models'."""
        return mixture([model.score(queries).float().cpu() for model in self.models])

    def fit(self, split: Split, run: Run | None = None) -> FitReport:
        """Not here: the models are trained already."""
        raise ConfigError("an ensemble has nothing to learn", hint="train its models")

    def state(self) -> dict[str, Tensor]:
        """Not here: its models are saved one by one."""
        raise ConfigError("an ensemble is not saved as one model", hint="save its models, or distil it: method('meal')")

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Not here."""
        raise ConfigError("an ensemble is not saved as one model", hint="load its models")
