"""Any encoder with any attention kind, augmentation and loss: each combination trains a step, or is refused with a reason."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from vouch import registry
from vouch.data import Catalog, Dataset, Interactions, Queries, Split, Vocabulary, split
from vouch.errors import ConfigError, UnknownIdError
from vouch.recommenders.sequential import parts
from vouch.recommenders.sequential.base import SequentialRecommender
from vouch.recommenders.sequential.config import SequenceConfig
from vouch.recommenders.sequential.gru4rec import GRU4Rec
from vouch.recommenders.sequential.sasrec import SASRec, SASRecConfig
from vouch.training import Run

SMALL: dict[str, Any] = {"hidden_size": 16, "max_length": 8, "epochs": 1, "batch_size": 32, "negatives": 5}
ENCODERS = sorted(slug for slug, kind in registry.methods().items() if issubclass(kind, SequentialRecommender))
ATTENTION = ["plain", *parts.parts("attention")]
AUGMENT = ["none", *parts.parts("augment")]
OBJECTIVE = [slug for slug in parts.parts("objective") if slug != "next"]
QUICK: dict[str, dict[str, Any]] = {"contrastive": {"warmup_epochs": 0}}
"""Settings under which a part takes part in the first epoch."""


@pytest.fixture(scope="module")
def rich() -> Split:
    """60 users of 6 to 20 events with times, over 30 items with a category and a set of tags."""
    import polars as pl

    generator = np.random.default_rng(0)
    lengths = generator.integers(6, 21, 60)
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(60)),
        Vocabulary.of_numbers(np.arange(30)),
        np.repeat(np.arange(60), lengths),
        generator.integers(0, 30, lengths.sum()).astype(np.int32),
        columns={"time": np.concatenate([np.sort(generator.integers(0, 10**7, n)) for n in lengths])},
    )
    table = pl.DataFrame(
        {
            "genre": [f"g{i % 4}" if i % 7 else None for i in range(30)],
            "tags": [[f"t{i % 3}", f"t{i % 5}"] for i in range(30)],
        }
    )
    return split(Dataset(log, Catalog(log.items, table, {"genre": "category", "tags": "categories"}), None, "rich"))


def build(slug: str, **settings: Any) -> SequentialRecommender:
    """A small model; settings for parts that are not in it are left out."""
    kind = registry.method(slug)
    known = {name: value for name, value in {**SMALL, **settings}.items() if name in kind.Config.model_fields}
    config = kind.Config(**known)
    quick = {part: given for part, given in QUICK.items() if part in config.used_parts()}
    return kind(**known, parts=quick) if quick else kind(config)


def trains(model: SequentialRecommender, made: Split) -> set[str]:
    """Train an epoch, rank, and give the names of the losses."""
    report = model.fit(made, Run(device="cpu"))
    assert all(math.isfinite(value) for value in report.history[-1].values())
    scores = model.score(Queries.from_histories([[1, 2, 3], [4]]))
    assert scores.shape == (2, 30) and torch.isfinite(scores).all()
    return set(report.history[-1])


@pytest.mark.parametrize("slug", ENCODERS)
@pytest.mark.parametrize("attention", ATTENTION)
def test_every_encoder_with_every_attention(rich: Split, slug: str, attention: str) -> None:
    if attention != "plain" and not registry.method(slug).attends:
        with pytest.raises(ConfigError, match="cannot take attention"):
            build(slug, attention=attention)
        return
    assert "next" in trains(build(slug, attention=attention), rich)


@pytest.mark.parametrize(("slug", "augment"), [*itertools.product(ENCODERS, AUGMENT[1:])])
def test_every_encoder_with_every_augmentation(rich: Split, slug: str, augment: str) -> None:
    try:
        model = build(slug, augment=augment)
    except ConfigError as error:
        assert f"{slug} cannot take" in error.what and ":" in error.what
        return
    assert {"next", "contrastive"} <= trains(model, rich)


@pytest.mark.parametrize(("slug", "term"), [*itertools.product(ENCODERS, OBJECTIVE)])
def test_every_encoder_with_every_loss(rich: Split, slug: str, term: str) -> None:
    default = registry.method(slug).Config.model_fields["objective"].default
    if term in registry.method(slug).Config().terms():
        return
    try:
        model = build(slug, objective=(*default, term))
    except ConfigError as error:
        assert f"{slug} cannot take objective {term!r}: " in error.what
        return
    assert len(trains(model, rich)) > 3


def test_losses_of_all_parts_add_up(rich: Split) -> None:
    settings = {"attention": "actsr", "augment": "ticoserec", "objective": ("next", "eclsr")}
    have = {"attention": ATTENTION, "augment": AUGMENT, "objective": OBJECTIVE}
    if "ticoserec" not in have["augment"] or "eclsr" not in have["objective"]:
        pytest.skip("the parts are not there yet")
    model = build("sasrec", **settings)
    names = trains(model, rich)
    assert {"next", "attack", "contrastive"} <= names and len(names) > 6


# Settings -----------------------------------------------------------------------------------------------------


def test_settings_of_parts_come_by_dots_and_by_mapping() -> None:
    by_dot = SASRecConfig(attention="actsr", **{"actsr.penalty": 0.5})
    assert by_dot == SASRecConfig(attention="actsr", parts={"actsr": {"penalty": 0.5}})
    assert by_dot == SASRecConfig.parse(["attention=actsr", "actsr.penalty=0.5"]) or by_dot.part("actsr").penalty == 0.5
    assert SASRecConfig.parse(["attention=actsr", "actsr.penalty=0.5"]).part("actsr").penalty == 0.5
    assert by_dot.updated({"actsr.penalty": 0.25, "epochs": 3}).part("actsr").penalty == 0.25
    assert type(by_dot)(**by_dot.model_dump(mode="json")) == by_dot


def test_a_method_keeps_its_own_part_settings_where_others_are_given() -> None:
    config = registry.method("actsr").Config(**{"actsr.combine": "fixed"})
    assert config.part("actsr").penalty == 0.03 and config.part("actsr").combine == "fixed"
    assert registry.method("actsr").Config(attention="plain").parts == {}  # another choice drops them


def test_lists_grow_by_plus() -> None:
    assert SASRecConfig.parse(["attention=actsr", "objective+=actsr"]).objective == ("next", "actsr")
    assert SASRecConfig.parse(["objective=next"]).objective == ("next",)
    with pytest.raises(ConfigError, match="is no list"):
        SASRecConfig.parse(["epochs+=3"])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"attention": "actrs"}, "no attention 'actrs'"),
        ({"augment": "ticosrec"}, "no augment 'ticosrec'"),
        ({"objective": ("next", "eclrs")}, "no objective 'eclrs'"),
        ({"objective": ("next", "next")}, "names 'next' twice"),
        ({"objective": ("actsr",)}, "has no 'next'"),
        ({"objective": "next"}, "is a list"),
        ({"actsr.penalty": 1}, "does not use"),
        ({"attention": "actsr", "actsr.penalti": 1}, "no setting 'penalti'"),
        ({"attention": "actsr", "actsr.penalty": -1}, "greater than or equal"),
        ({"attention": "actsr", "parts": {"nobody": {}}}, "no part 'nobody'"),
    ],
)
def test_bad_choices_name_what_is_wrong(settings: dict[str, Any], match: str) -> None:
    with pytest.raises((ConfigError, UnknownIdError)) as caught:
        SASRec(**settings)
    assert match in caught.value.what or match in str(caught.value.hint)


def test_tables_of_settings_list_those_of_the_parts() -> None:
    rows = {row.name: row for row in registry.method("actsr").Config.rows()}
    assert rows["actsr.penalty"].default == 0.03 and "parts" not in rows
    assert "actsr.penalty" in registry.method("actsr").Config.search_space()
    assert not any("." in row.name for row in SASRecConfig.rows())


def test_an_encoder_without_attention_says_so() -> None:
    with pytest.raises(ConfigError, match="its encoder is no transformer") as caught:
        GRU4Rec(attention="actsr")
    assert "sasrec" in str(caught.value.hint)


def test_drawing_for_a_loss_leaves_the_batches_as_they_were(rich: Split) -> None:
    model = SASRec(**SMALL)
    model.begin(rich)
    plain = list(model.batches(rich.train).epoch(np.random.default_rng(3), 0, 1))
    drawn = model.batches(rich.train, {"x": lambda histories, generator: torch.from_numpy(generator.random(4))})
    other = list(drawn.epoch(np.random.default_rng(3), 0, 1))
    for a, b in zip(plain, other, strict=True):
        assert torch.equal(a.items, b.items) and torch.equal(a.target, b.target)
        assert torch.equal(a.negatives, b.negatives) and set(b.extra) == {"x"}
        assert torch.equal(a.user, b.user)


def test_histories_of_a_batch_are_what_the_encoder_reads(rich: Split) -> None:
    seen = []
    model = SASRec(**SMALL)
    model.begin(rich)
    source = model.batches(rich.train, {"x": lambda histories, generator: seen.append(histories)})
    for batch in source.epoch(np.random.default_rng(0), 0, 1):
        histories = seen[-1]
        rows, bounds = histories.rows()
        real = batch.items >= 0
        assert batch.items[real].tolist() == histories.log.item[rows].tolist()
        assert np.diff(bounds).tolist() == batch.lengths.tolist() and batch.user.tolist() == histories.user.tolist()
        last = torch.cumsum(batch.lengths, 0) - 1
        assert batch.target[last].tolist() == histories.log.item[histories.known - 1].tolist()


@pytest.mark.parametrize("slug", ENCODERS)
def test_least_history_asks_later_positions_only(rich: Split, slug: str) -> None:
    if slug == "bert4rec":
        pytest.skip("it has no next item in training")
    model = build(slug, min_history=4)
    model.begin(rich)
    for batch in model.batches(rich.train).epoch(np.random.default_rng(0), 0, 1):
        assert (batch.at % batch.items.shape[1] >= 3).all()
        assert batch.weight.item() == pytest.approx(1 / len(batch.target))


def test_every_part_has_settings_and_a_summary() -> None:
    for kind in ("attention", "augment", "objective"):
        for slug, found in parts.parts(kind).items():  # type: ignore[arg-type]
            assert found.summary and found.slug == slug and found.kind == kind
            assert found.Config is parts.settings_class(slug)
            assert all(brought in parts.parts("objective") for brought in found.brings)


def test_configs_without_parts_need_none() -> None:
    assert SequenceConfig().terms() == ["next"] and SequenceConfig().parts == {}


def test_settings_are_found_by_the_names_of_the_table() -> None:
    config = registry.method("actsr").Config(**{"actsr.penalty": 0.2})
    assert config.value("actsr.penalty") == 0.2 and config.value("num_layers") == 3
    assert registry.method("actsr").Config(attention="plain").value("actsr.penalty") is None


def test_the_word_none_is_a_word_where_there_must_be_one():
    assert SASRecConfig.parse(["augment=none"]).augment == "none"
