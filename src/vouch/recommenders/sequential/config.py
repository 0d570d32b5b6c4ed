"""Settings of sequential recommenders: the shared ones, and which parts a model is composed of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from vouch.config import Choice, SettingRow, Span, setting
from vouch.errors import ConfigError
from vouch.recommenders.sequential import parts
from vouch.training import TrainConfig

Loss = Literal["auto", "ce", "sampled_softmax", "hard_softmax", "gbce", "bce", "bpr", "top1", "bpr_max"]


class SequenceConfig(TrainConfig):
    """Settings of every sequential recommender.

    Settings of a part are written `SLUG.NAME`, as in `SASRec(attention="actsr", **{"actsr.penalty": 0.03})`, and kept
    in `parts`; a method's own defaults for its parts stay where they are not given.
    """

    hidden_size: int = setting(64, "length of the item and query vectors", ge=2, search=Choice((32, 64, 128)))
    max_length: int = setting(50, "most recent history items that are read", ge=2)
    dropout: float = setting(0.5, "share of activations dropped in training", ge=0, lt=1, search=Span(0.1, 0.6))
    attention: str = setting("plain", "attention kind of the transformer")
    augment: str = setting("none", "how other views of a history are made")
    objective: tuple[str, ...] = setting(("next",), "losses that are added up; += adds one")
    parts: dict[str, dict[str, Any]] = setting({}, "settings of the parts, written SLUG.NAME=VALUE")
    loss: Loss = setting("auto", "next-item loss at every position; auto is ce up to 5,000 items, else sampled_softmax")
    negatives: int = setting(1024, "items drawn for the losses that sample (bce and bpr always draw 1)", ge=1)
    negatives_by: Literal["uniform", "popularity"] = setting(
        "uniform", "how they are drawn; popularity draws by count ** 0.75 and corrects the softmax for it"
    )
    calibration: float = setting(0.75, "for gbce: t, 0 is plain BCE, 1 gives calibrated probabilities", ge=0, le=1)
    hardness: float = setting(1.0, "for hard_softmax: how much near negatives count; 0 is the plain softmax", ge=0)
    every_window: bool = setting(True, "learn from all of a long history, not only its last max_length events")
    min_history: int = setting(1, "events that must come before one that is learned from", ge=1)
    epochs: int = setting(200, "most passes over the training log", ge=1)
    batch_size: int = setting(128, "histories of one batch", ge=1)
    patience: int = setting(15, "validations without a better value before training stops", ge=1)

    def __init__(self, **values: Any) -> None:
        plain = {name: value for name, value in values.items() if "." not in name}
        chosen = {name: plain.get(name, type(self).model_fields[name].default) for name in CHOICES}
        used = _used(**chosen)
        own = type(self).model_fields["parts"].default
        settings = {slug: dict(given) for slug, given in own.items() if slug in used}
        for slug, given in (plain.pop("parts", None) or {}).items():
            settings.setdefault(slug, {}).update(given)
        for name, value in values.items():
            slug, dot, inner = name.partition(".")
            if dot:
                settings.setdefault(slug, {})[inner] = value
        for slug, given in settings.items():
            kind = parts.settings_class(slug)
            if slug not in used:
                raise ConfigError(
                    f"there are settings for {slug!r}, which this model does not use",
                    hint=f"set attention, augment or objective+= to it; in use: {', '.join(used)}",
                )
            kind(**given)
        super().__init__(**{**plain, "parts": settings})

    def used_parts(self) -> list[str]:
        """Slugs of all parts in use, `next` among them."""
        return _used(self.attention, self.augment, self.objective)

    def terms(self) -> list[str]:
        """The objective, with what the other parts bring."""
        return _terms(self.attention, self.augment, self.objective)

    def part(self, slug: str) -> Any:
        """The settings of a part."""
        return parts.settings_class(slug)(**self.parts.get(slug, {}))

    def value(self, name: str) -> Any:
        """A setting by its name; None where it is that of a part that is not in use."""
        slug, dot, inner = name.partition(".")
        if not dot:
            return getattr(self, name)
        return getattr(self.part(slug), inner) if slug in self.used_parts() else None

    @classmethod
    def rows(cls) -> list[SettingRow]:
        """The settings table, with those of the parts that the method uses by default."""
        default = {name: cls.model_fields[name].default for name in (*CHOICES, "parts")}
        found = [row for row in super().rows() if row.name != "parts"]
        for slug in _used(**{name: default[name] for name in CHOICES}):
            own = default["parts"].get(slug, {})
            for row in parts.settings_class(slug).rows():
                found.append(replace(row, name=f"{slug}.{row.name}", default=own.get(row.name, row.default)))
        return found


CHOICES = ("attention", "augment", "objective")


def _terms(attention: str, augment: str, objective: Sequence[str]) -> list[str]:
    """The objective with what the other parts bring.

    Raises:
        UnknownIdError: a part is not known. ConfigError: a loss is named twice, or the next item's is missing.
    """
    if isinstance(objective, str):
        raise ConfigError(f"objective is {objective!r}", hint="it is a list of losses, for example ['next']")
    twice = [slug for slug, count in Counter(objective).items() if count > 1]
    if twice:
        raise ConfigError(f"the objective names {twice[0]!r} twice", hint="a loss has a weight for that")
    if "next" not in objective:
        raise ConfigError("the objective has no 'next', without which nothing is recommended", hint="objective+=...")
    named = list(objective)
    if attention != "plain":
        named += parts.find("attention", attention).brings
    if augment != "none":
        named += parts.find("augment", augment).brings
    named = list(dict.fromkeys(named))
    for slug in named:
        if slug != "next":
            parts.find("objective", slug)
    return named


def _used(attention: str, augment: str, objective: Sequence[str]) -> list[str]:
    terms = _terms(attention, augment, objective)
    chosen = [slug for slug, none in ((attention, "plain"), (augment, "none")) if slug != none]
    return list(dict.fromkeys([*chosen, *terms]))
