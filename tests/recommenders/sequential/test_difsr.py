"""DIF-SR: scores by brute force, what no position may see, what values carry, attributes as vectors and as targets."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from vouch.data import Catalog, Dataset, Interactions, Queries, Split, Vocabulary, split
from vouch.errors import ConfigError, DataError, UnknownIdError
from vouch.nn.transformer import Context
from vouch.recommenders import load
from vouch.recommenders.sequential.bert4rec import BERT4Rec
from vouch.recommenders.sequential.difsr import (
    DIFSR,
    AttributesConfig,
    AttributeVectors,
    DecoupledConfig,
    attribute_tables,
    binned,
)
from vouch.recommenders.sequential.sasrec import SASRec, SASRecEncoder
from vouch.training import Run, seeded

SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_heads": 2,
    "num_layers": 1,
    "max_length": 7,
    "inner_size": 8,
    "batch_size": 16,
    "epochs": 2,
    "dropout": 0.0,
    "loss": "ce",
    "difsr.attribute_size": 4,
}
FUSIONS = ("sum", "gate", "concat")


def catalog(items: Vocabulary, **columns: Any) -> Catalog:
    n = len(items)
    table = {
        "genre": [f"g{i % 4}" if i % 6 else None for i in range(n)],
        "tags": [[f"t{i % 3}", f"t{i % 5}"] if i % 7 else [] for i in range(n)],
        "price": [float(i) if i % 4 else None for i in range(n)],
    }
    roles = {"genre": "category", "tags": "categories", "price": "number"}
    return Catalog(items, pl.DataFrame({**table, **columns}), {**roles, **dict.fromkeys(columns, "category")})


@pytest.fixture(scope="module")
def rich(made: Split) -> Split:
    """The small log with a genre, a set of tags and a price for each item, some missing."""
    log = made.dataset.interactions
    return split(Dataset(log, catalog(log.items), None, "rich"))


def started(rich: Split, kind: Any = DIFSR, **settings: Any) -> Any:
    model = kind(**{**SMALL, **settings})
    torch.manual_seed(0)
    model.begin(rich)
    with torch.no_grad():
        for value in model.network.parameters():
            value.normal_(std=0.5)
    model.network.eval()
    return model


def watched(model: Any, items: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, Context]:
    context = Context(watch=True)
    return model.network(items, lengths, context), context


ITEMS = torch.tensor([[3, 6, 7, 12, 1], [9, 0, 14, -1, -1]])
LENGTHS = torch.tensor([5, 3])


# Attributes as vectors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("missing", ["own", "zero"])
def test_vectors_of_attributes_by_hand(pooling: Any, missing: Any) -> None:
    codes = torch.tensor([[1, 2], [3, 0], [0, 0]])
    made = AttributeVectors(codes, 4, AttributesConfig(pooling=pooling, missing=missing))
    w = made.weight
    got = made(torch.tensor([0, 1, 2, 3, 4]))  # padding, three items, a hidden item
    assert torch.equal(got[0], torch.zeros(4)) and torch.equal(got[4], torch.zeros(4))
    assert torch.allclose(got[1], (w[1] + w[2]) / (2 if pooling == "mean" else 1))
    assert torch.allclose(got[2], w[3])
    assert torch.allclose(got[3], w[0] if missing == "own" else torch.zeros(4))


def test_tables_take_all_categorical_fields_or_those_named(rich: Split) -> None:
    source = rich.dataset.catalog
    assert list(attribute_tables(source, AttributesConfig())) == ["genre", "tags"]
    tags = attribute_tables(source, AttributesConfig())["tags"]
    assert np.count_nonzero(tags[15]) == 1 and np.count_nonzero(tags[18]) == 2  # t0 twice is t0
    tables = attribute_tables(source, AttributesConfig(fields=("price", "genre"), bins=3))
    assert list(tables) == ["price", "genre"]
    assert tables["genre"][6].tolist() == [0] and tables["genre"][1].tolist() == tables["genre"][5].tolist()


def test_numbers_are_cut_into_equal_parts(rich: Split) -> None:
    codes = binned(rich.dataset.catalog, "price", 3)[:, 0]
    n = len(codes)
    values = np.array([i if i % 4 else np.nan for i in range(n)])
    assert (codes[np.isnan(values)] == 0).all() and set(codes[~np.isnan(values)]) == {1, 2, 3}
    order = np.argsort(values[~np.isnan(values)])
    assert (np.diff(codes[~np.isnan(values)][order]) >= 0).all()
    counts = np.bincount(codes)[1:]
    assert counts.max() - counts.min() <= 2


def test_what_cannot_be_read_is_named(made: Split, rich: Split) -> None:
    with pytest.raises(DataError, match="no attributes of items") as caught:
        DIFSR(**SMALL).begin(made)
    assert "--items" in str(caught.value.hint)
    with pytest.raises(UnknownIdError, match="'gnere'"):
        DIFSR(**SMALL, **{"difsr.fields": ["gnere"]}).begin(rich)
    log = rich.dataset.interactions
    empty = catalog(log.items, brand=pl.Series([None] * log.n_items, dtype=pl.String))
    with pytest.raises(DataError, match="no item has a value of the attribute 'brand'"):
        DIFSR(**SMALL, **{"difsr.fields": ["brand"]}).begin(split(Dataset(log, empty, None, "x")))
    same = catalog(log.items, brand=["one"] * log.n_items)
    with pytest.warns(UserWarning, match="'brand' has one value only"):
        DIFSR(**SMALL, **{"difsr.fields": ["brand"]}).begin(split(Dataset(log, same, None, "x")))
    some = catalog(log.items, brand=["one", *[None] * (log.n_items - 1)])  # to have it tells something
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute_tables(some, AttributesConfig(fields=("brand",)))


def test_heads_must_divide_the_attribute_size(rich: Split) -> None:
    with pytest.raises(ConfigError, match="num_heads"):
        DIFSR(**{**SMALL, "difsr.attribute_size": 3}).begin(rich)


# The attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("positions", [True, False])
def test_weights_equal_the_formulas_row_by_row(rich: Split, fusion: str, positions: bool) -> None:
    model = started(rich, **{"difsr.fusion": fusion, "difsr.positions": positions})
    network = model.network
    _, context = watched(model, ITEMS, LENGTHS)
    kind, layer, L = network.transformer.attention, network.transformer.blocks[0].attention, 7
    x = network.transformer.norm(network.item(network.rows(ITEMS)))
    q, k = layer.query(x), layer.key_value(x).chunk(2, -1)[0]
    for b, n in enumerate(LENGTHS.tolist()):
        for h in range(2):
            part, small = slice(4 * h, 4 * h + 4), slice(2 * h, 2 * h + 2)
            for i in range(n):
                rows = []
                rows.append([float(q[b, i, part] @ k[b, j, part]) for j in range(i + 1)])
                if positions:
                    P = kind.position.weight
                    pq, pk = layer.position_query(P)[:, part], layer.position_key(P)[:, part]
                    rows.append([float(pq[n - 1 - i] @ pk[n - 1 - j]) for j in range(i + 1)])
                for f, field in enumerate(kind.fields):
                    F = field(network.rows(ITEMS))[b]
                    fq, fk = layer.field_query[f](F)[:, small], layer.field_key[f](F)[:, small]
                    rows.append([float(fq[i] @ fk[j]) for j in range(i + 1)])
                if fusion == "sum":
                    fused = [sum(column) for column in zip(*rows, strict=True)]
                else:
                    # columns count back from the query; what is not seen is 0
                    back = [[*reversed(row), *[0.0] * (L - i - 1)] for row in rows]
                    if fusion == "gate":
                        energy = []
                        for row in back:
                            inner = torch.relu(layer.inner.weight @ torch.tensor(row) + layer.inner.bias)
                            energy.append(float(layer.energy.weight[0] @ inner + layer.energy.bias[0]))
                        g = torch.softmax(torch.tensor(energy), 0).tolist()
                        assert sum(g) == pytest.approx(1) and min(g) >= 0
                        fused = [sum(w * row[j] for w, row in zip(g, rows, strict=True)) for j in range(i + 1)]
                    else:
                        out = (
                            layer.joined.weight @ torch.tensor([value for row in back for value in row])
                            + layer.joined.bias
                        )
                        fused = [float(out[i - j]) for j in range(i + 1)]
                want = torch.softmax(torch.tensor(fused) / 4**0.5, 0)
                got = context.notes["attention"][0][b, h, i]
                assert torch.allclose(got[: i + 1], want, atol=1e-5)
                assert (got[i + 1 :] == 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_no_output_depends_on_later_items(rich: Split, fusion: str) -> None:
    model = started(rich, num_layers=2, **{"difsr.fusion": fusion})
    changed = ITEMS.clone()
    changed[0, 3:] = torch.tensor([20, 21])
    before, after = (model.network(items, LENGTHS) for items in (ITEMS, changed))
    assert torch.allclose(before[0, :3], after[0, :3], atol=1e-6)
    assert not torch.allclose(before[0, 3:], after[0, 3:], atol=1e-3)


@pytest.mark.parametrize("slug", ["difsr", "bert4rec"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_longer_neighbours_in_the_batch_change_nothing(rich: Split, slug: str, fusion: str) -> None:
    shape = {name: value for name, value in SMALL.items() if name != "inner_size" or slug == "difsr"}
    settings = {} if slug == "difsr" else {"attention": "difsr"}
    kind = DIFSR if slug == "difsr" else BERT4Rec
    model = kind(**shape, **settings, **{"difsr.fusion": fusion})
    model.begin(rich)
    with torch.no_grad():
        for value in model.network.parameters():
            value.normal_(std=0.5)
    short, both = Queries.from_histories([[1, 2, 3]]), Queries.from_histories([[1, 2, 3], [4, 5, 6, 7, 8]])
    assert torch.allclose(model.score(short)[0], model.score(both)[0], atol=1e-4)


def test_without_positions_the_order_does_not_matter(rich: Split) -> None:
    model = started(rich, **{"difsr.fusion": "sum", "difsr.positions": False})
    turned = torch.cat([ITEMS[:1, [2, 0, 3, 1, 4]]])
    one, other = (model.network(items, LENGTHS[:1])[0, 4] for items in (ITEMS[:1], turned))
    assert torch.allclose(one, other, atol=1e-5)
    placed = started(rich, **{"difsr.fusion": "sum"})
    one, other = (placed.network(items, LENGTHS[:1])[0, 4] for items in (ITEMS[:1], turned))
    assert not torch.allclose(one, other, atol=1e-3)


def test_values_carry_no_side_information(rich: Split) -> None:
    model = started(rich, **{"difsr.fusion": "sum"})
    before = model.network(ITEMS, LENGTHS)
    layer = model.network.transformer.blocks[0].attention
    kind = model.network.transformer.attention
    with torch.no_grad():
        for query in layer.field_query:
            query.weight.zero_()
            query.bias.zero_()
    silent = model.network(ITEMS, LENGTHS)
    assert not torch.allclose(before, silent, atol=1e-3)
    with torch.no_grad():
        for field in kind.fields:
            field.weight.normal_()
    assert torch.allclose(model.network(ITEMS, LENGTHS), silent, atol=1e-6)


def test_without_fields_and_positions_it_is_sasrec_without_positions(rich: Split) -> None:
    """The scores of positions and attributes are all that is added."""
    plain = SASRecEncoder(25, SASRec(**{k: v for k, v in SMALL.items() if "." not in k}, positions=False).config).eval()
    model = started(rich, **{"difsr.fusion": "sum", "difsr.positions": False})
    layer = model.network.transformer.blocks[0].attention
    with torch.no_grad():
        for value in plain.parameters():
            value.normal_(std=0.5)
        for query in layer.field_query:
            query.weight.zero_()
            query.bias.zero_()
    missing = model.network.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert torch.allclose(model.network(ITEMS, LENGTHS), plain(ITEMS, LENGTHS), atol=1e-6)


def test_parameters_are_as_many_as_published() -> None:
    """The frozen model of Beauty: 5,355,783 trainable values, by its log."""
    n, labels = 12_101, 354
    config = DIFSR(
        hidden_size=256,
        num_layers=4,
        num_heads=8,
        inner_size=256,
        max_length=50,
        **{"difsr.attribute_size": 64, "difsr.embeddings": "frozen"},
    )
    codes = torch.arange(n).remainder(labels).add(1).unsqueeze(1)
    encoder = config.encoder(n, {"attribute.000.categories": codes})
    predictor = 256 * (labels + 1) + labels + 1
    assert sum(p.numel() for p in encoder.parameters() if p.requires_grad) + predictor == 5_355_783


def test_frozen_vectors_stay_as_drawn_and_learned_ones_move(rich: Split) -> None:
    for kind, std in (("frozen", 1.0), ("learned", 0.02)):
        fresh, trained = (DIFSR(**SMALL, weight_decay=0.1, **{"difsr.embeddings": kind}) for _ in range(2))
        with seeded(2):
            fresh.begin(rich)
        trained.fit(rich, Run(seed=2, device="cpu"))
        before, after = (model.network.transformer.attention.fields[1].weight for model in (fresh, trained))
        assert before.std().item() == pytest.approx(std, rel=0.5)
        assert torch.equal(before, after) == (kind == "frozen")


# The predictor ------------------------------------------------------------------------------------------------


def test_the_predictors_loss_by_hand(rich: Split) -> None:
    model = DIFSR(**SMALL, **{"difsr.predict": 3.0})
    objective = model.begin(rich)
    batch = next(iter(model.batches(rich.train).epoch(np.random.default_rng(0), 0, 1)))
    got = objective.loss(batch)["attributes"].item()
    hidden = model.network(batch.items, batch.lengths).flatten(0, 1)[batch.at]
    term, total = objective.terms["difsr"], 0.0
    for head, name in zip(term.heads, ("genre", "tags"), strict=True):
        attribute = rich.dataset.catalog.attribute(name)
        wanted = np.zeros((25, len(attribute.labels)))
        for item, codes in enumerate(attribute.codes):
            wanted[item, codes] = 1
        p = torch.sigmoid(head(hidden)).double().detach().numpy()[:, 1:]
        y = wanted[batch.target.numpy()][:, 1:]
        total += -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    assert got == pytest.approx(3 * total, rel=1e-4)


def test_without_weight_the_items_loss_is_all(rich: Split) -> None:
    objective = DIFSR(**SMALL, **{"difsr.predict": 0.0}).begin(rich)
    assert set(objective.terms) == {"next"}
    alone = SASRec(**{k: v for k, v in SMALL.items() if "." not in k}, objective=("next", "difsr")).begin(rich)
    assert set(alone.terms) == {"next", "difsr"}


def test_attributes_help_where_they_tell_all() -> None:
    """The next category follows the last; items within are drawn at random: attributes must pay."""
    random = np.random.default_rng(0)
    state = random.integers(0, 5, 150)
    histories = []
    for _ in range(7):
        histories.append(state * 12 + random.integers(0, 12, 150))
        state = (state + 1) % 5
    items = np.stack(histories, 1)
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(150)),
        Vocabulary.of_numbers(np.arange(60)),
        np.repeat(np.arange(150), 7),
        items.ravel().astype(np.int32),
    )
    table = Catalog(log.items, pl.DataFrame({"c": [f"c{i // 12}" for i in range(60)]}), {"c": "category"})
    from vouch.evaluation import evaluate

    made = split(Dataset(log, table, None, "x"))
    shape = {**SMALL, "hidden_size": 16, "epochs": 15, "evaluate_every": 15, "learning_rate": 5e-3}
    plain, with_them = SASRec(**{k: v for k, v in shape.items() if "." not in k}), DIFSR(**shape)
    values = []
    for model in (plain, with_them):
        model.fit(made, Run(device="cpu"))
        values.append(evaluate(model, made.test, metrics=["HR@10"], exclude="none").metrics["HR@10"])
    assert values[1] > values[0] + 0.05 and not math.isnan(values[0])


def test_a_saved_model_knows_the_attributes(rich: Split, tmp_path: Path) -> None:
    model, queries = started(rich), Queries.from_histories([[1, 2, 3], [7]])
    model.save(tmp_path / "model")
    assert torch.equal(load(tmp_path / "model").score(queries), model.score(queries))


def test_early_fusion_adds_attributes_to_the_items(rich: Split) -> None:
    shape = {k: v for k, v in SMALL.items() if "." not in k}
    model = SASRec(**shape, attention="early")
    model.begin(rich)
    network = model.network.eval()
    plain = SASRecEncoder(25, SASRec(**shape).config).eval()
    plain.load_state_dict({k: v for k, v in network.state_dict().items() if ".attention.fields." not in k})
    x = plain.item(plain.rows(ITEMS))
    for field in network.transformer.attention.fields:
        x = x + field(plain.rows(ITEMS))
    assert torch.allclose(network(ITEMS, LENGTHS), plain.read(x, LENGTHS, Context()), atol=1e-6)


def test_settings_are_typed() -> None:
    assert DecoupledConfig().fusion == "gate" and DIFSR().config.part("difsr").predict == 10.0
    with pytest.raises(ConfigError, match="fusion"):
        DIFSR(**{"difsr.fusion": "product"})
