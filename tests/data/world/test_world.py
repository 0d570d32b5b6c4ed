"""The embedded world: the same everywhere, true to its settings, and its truth is the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vouch import evaluate, method, split
from vouch.data import Queries
from vouch.data.world import World, WorldConfig, build, text, write_log
from vouch.data.world import config as world_config
from vouch.data.world.events import make_events
from vouch.data.world.items import BRANDS, CATEGORIES, CONSUMABLE, make_items
from vouch.data.world.users import make_users
from vouch.errors import ConfigError, UnknownIdError


@pytest.fixture(scope="module")
def world() -> World:
    return build(WorldConfig())


def test_equal_settings_give_equal_worlds_and_other_seeds_others(world: World) -> None:
    again = build(WorldConfig())
    assert again.dataset.interactions.fingerprint == world.dataset.interactions.fingerprint
    assert again.dataset.catalog.table.equals(world.dataset.catalog.table)
    other = build(WorldConfig(seed=1))
    assert other.dataset.interactions.fingerprint != world.dataset.interactions.fingerprint


def test_the_world_has_the_size_and_the_shares_asked_for(world: World) -> None:
    log, truth = world.dataset.interactions, world.truth
    assert log.n_users == 2000 and log.n_items == 1500
    assert len(log) == pytest.approx(60_000, rel=0.1)
    assert log.lengths.min() >= 5 and log.lengths.max() > 8 * np.median(log.lengths)
    assert truth.is_noise.mean() == pytest.approx(world.config.noise_share, abs=0.02)
    assert 0.02 < truth.is_repeat.mean() < 0.1
    counts = np.sort(log.item_counts)[::-1]
    assert counts[:150].sum() / counts.sum() > 0.25
    assert (log.item_counts > 0).mean() > 0.95


def test_rows_are_in_order_and_sessions_have_gaps(world: World) -> None:
    log = world.dataset.interactions
    assert log.time is not None
    same = log.user[1:] == log.user[:-1]
    gaps = np.diff(log.time)[same]
    assert (gaps > 0).all()
    short = gaps[gaps < 1800]
    assert 0.6 < len(short) / len(gaps) < 0.9
    assert np.median(short) < 120
    assert np.median(gaps[gaps >= 1800]) > 86_400 / 2
    assert log.time.min() >= world_config.START
    assert log.time.max() < world_config.START + world_config.YEARS * 366 * 86_400


def test_domains_and_scenarios_share_people_and_goods(world: World) -> None:
    log, users, items = world.dataset.interactions, world.truth.users, world.truth.items
    assert log.domain is not None and log.scenario is not None
    assert log.labels == {"scenario": ["search", "feed", "mail"], "domain": ["home", "fashion"]}
    both = [len(set(log.domain[log.offsets[u] : log.offsets[u + 1]].tolist())) == 2 for u in range(log.n_users)]
    assert 0.2 < np.mean(both) < 0.9
    assert (users.home | users.fashion).all()
    away = log.domain != items.domain[log.item]
    assert 0 < away.mean() < 0.1
    assert items.shared[log.item[away]].all()
    for scenario in range(3):
        used = np.unique(log.user[log.scenario == scenario])
        assert len(used) > 0.5 * log.n_users


def test_feeds_are_noisier_than_search_and_the_top_of_a_list_is_clicked_most(world: World) -> None:
    log, truth = world.dataset.interactions, world.truth
    assert log.scenario is not None
    assert truth.is_noise[log.scenario == 1].mean() > 2 * truth.is_noise[log.scenario == 0].mean()
    places = np.bincount(truth.position, minlength=11)[1:]
    assert (np.diff(places) < 0).sum() >= 8 and places[0] > 2 * places[5]
    assert truth.is_noise[truth.position == 1].mean() > truth.is_noise[truth.position >= 6].mean()


def test_the_truth_is_in_line_with_the_rows(world: World) -> None:
    log, truth = world.dataset.interactions, world.truth
    caused = ~truth.is_noise & ~truth.is_repeat
    assert (truth.interest[truth.is_noise] == -1).all()
    assert (truth.items.cluster[log.item[caused]] == truth.interest[caused]).all()
    mine = truth.users.interests[log.user[caused]]
    assert (mine == truth.interest[caused][:, None]).any(1).all()
    assert CONSUMABLE[truth.items.category[log.item[truth.is_repeat]]].all()
    earlier = [
        log.item[row] in log.item[log.offsets[log.user[row]] : row] for row in np.flatnonzero(truth.is_repeat)[:300]
    ]
    assert all(earlier)


def test_relevance_is_a_probability_and_matches_what_people_do(world: World) -> None:
    log, truth = world.dataset.interactions, world.truth
    users = np.arange(0, 2000, 7)
    relevance = truth.relevance(users, 0.5)
    np.testing.assert_allclose(relevance.sum(1), 1.0, rtol=1e-9)
    rows = np.flatnonzero(~truth.is_noise & ~truth.is_repeat)[::17]
    noise = np.flatnonzero(truth.is_noise)[::3]
    of_rows = truth.relevance(log.user[rows], truth.life[rows])[np.arange(len(rows)), log.item[rows]]
    of_noise = truth.relevance(log.user[noise], truth.life[noise])[np.arange(len(noise)), log.item[noise]]
    assert of_rows.min() > 0
    assert of_rows.mean() > 3 * of_noise.mean()


def test_interests_drift_as_told() -> None:
    still, moving = (build(WorldConfig(drift=d, users=300, events=6000)) for d in (0.0, 1.0))
    users = np.arange(300)
    change = [
        np.abs(w.truth.interests(users, 0.0) - w.truth.interests(users, 1.0)).sum(1).mean() for w in (still, moving)
    ]
    assert change[0] == pytest.approx(0.0, abs=1e-12)
    assert change[1] > 0.3


class _Oracle:
    """Scores by the truth."""

    def __init__(self, world: World, kind: str) -> None:
        self.world, self.kind = world, kind

    def score_or_popularity(self, queries: Queries) -> object:
        import torch

        truth = self.world.truth
        user = queries.user.astype(np.int64)
        if self.kind == "relevance":
            return torch.from_numpy(truth.relevance(user, 1.0))
        last = queries.item[queries.offsets[1:] - 1]
        return torch.from_numpy(truth.next_item(user, last) + 1e-3 * truth.relevance(user, 1.0))


def test_the_truth_ranks_better_than_popularity_and_order_helps(world: World) -> None:
    made = split(world.dataset)
    popular = method("popularity")()
    popular.fit(made)
    found = {
        name: evaluate(model, made.test, metrics=["NDCG@10"], exclude="none").metrics["NDCG@10"]
        for name, model in {
            "popularity": popular,
            "relevance": _Oracle(world, "relevance"),
            "next": _Oracle(world, "next"),
        }.items()
    }
    assert found["relevance"] > 2 * found["popularity"]
    assert found["next"] > found["relevance"]


def test_the_next_item_follows_its_law() -> None:
    """Over many events, what follows an item within its interest is as often each item as the truth says."""
    world = build(WorldConfig(users=4000, items=240, events=400_000, noise_share=0.0, repeat_share=0.0, seed=5))
    log, truth = world.dataset.interactions, world.truth
    key = log.user.astype(np.int64) * truth.items.n_clusters + truth.interest
    order = np.lexsort((np.arange(len(log)), key))
    same = key[order][1:] == key[order][:-1]
    before, after = log.item[order[:-1][same]], log.item[order[1:][same]]
    common = np.bincount(before).argsort()[::-1][:12]
    expected = truth.next_item(np.zeros(len(common), np.int64), common)
    np.testing.assert_allclose(expected.sum(1), 1.0, rtol=1e-9)
    for item, law in zip(common, expected, strict=True):
        seen = np.bincount(after[before == item], minlength=240) / (before == item).sum()
        assert 0.5 * np.abs(seen - law).sum() < 0.12  # total variation


def test_ratings_say_how_well_a_thing_fits(world: World) -> None:
    log, truth = world.dataset.interactions, world.truth
    assert log.value is not None
    assert set(np.unique(log.value)) <= {1, 2, 3, 4, 5}
    assert np.corrcoef(log.value, truth.expected_value)[0, 1] > 0.6
    assert log.value[truth.is_noise].mean() < log.value[~truth.is_noise].mean() - 0.5


def test_reviews_agree_with_the_item_and_the_rating(world: World) -> None:
    log, items = world.dataset.interactions, world.truth.items
    assert log.value is not None
    for row in range(0, 3000, 13):
        review, aspects = world.review(row), world.aspects(row)
        code = int(log.item[row])
        assert review == world.review(row)
        if "colour" in aspects:
            assert text.colour_names()[items.colour[code]] in review
        if "brand" in aspects:
            assert BRANDS[items.domain[code]][items.brand[code]] in review
        words = text.PRAISE if log.value[row] >= 4 else text.COMPLAINT if log.value[row] <= 2 else text.MIDDLING
        assert any(word in review for word in words)
    favourite = text.ASPECTS[int(log.user[0]) % 4]
    assert all(favourite in world.aspects(row) for row in range(int(log.offsets[1])))


def test_titles_and_catalogue_tell_the_attributes(world: World) -> None:
    catalog, items = world.dataset.catalog, world.truth.items
    assert catalog.columns("title") == ["title"]
    for code in range(0, 1500, 111):
        assert CATEGORIES[items.category[code]] in catalog.title(code)
    assert catalog.table["title"].n_unique() > 1400
    style = catalog.features["style"]
    near = style @ items.centres.T
    assert (near.argmax(1) == items.cluster).mean() > 0.8


def test_pictures_are_the_same_each_time_and_differ_between_goods(world: World) -> None:
    pictures = {}
    for category in range(12):
        code = int(np.flatnonzero(world.truth.items.category == category)[0])
        picture = np.asarray(world.picture(code, 64), dtype=np.float64)
        np.testing.assert_array_equal(picture, np.asarray(world.picture(code, 64)))
        assert picture.shape == (64, 64, 3) and picture.std() > 8
        pictures[category] = picture
    for a in range(12):
        for b in range(a):
            assert np.abs(pictures[a] - pictures[b]).mean() > 3


def test_written_pictures_are_in_the_catalogue(tmp_path: Path) -> None:
    world = build(WorldConfig(users=10, items=48, events=60)).write_pictures(tmp_path / "pictures", size=32)
    assert world.dataset.catalog.columns("media") == ["picture"]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 48


def test_a_stream_holds_the_same_rows_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("vouch.data.world.config", "vouch.data.world.users", "vouch.data.world.events"):
        monkeypatch.setattr(f"{module}.BLOCK", 64)
    config = WorldConfig(users=300, items=100, events=5000, seed=3)
    frame = pl.read_parquet(write_log(config, tmp_path / "log.parquet"))
    log = build(config).dataset.interactions
    np.testing.assert_array_equal(frame["user"].to_numpy() - 1, log.user)
    np.testing.assert_array_equal(frame["item"].to_numpy() - 1, log.item)
    np.testing.assert_array_equal(frame["time"].to_numpy(), log.time)
    assert frame["domain"].to_list() == [log.labels["domain"][code] for code in log.domain]  # type: ignore[union-attr]


def test_a_block_does_not_depend_on_how_many_follow() -> None:
    small, large = WorldConfig(users=100, events=2000), WorldConfig(users=9000, events=180_000)
    items = make_items(small)
    first = make_events(small, items, make_users(small, items, 0), 0)
    assert len(first.user) == first.user.size == make_users(small, items, 0).n_events.sum()
    again = make_events(large, items, make_users(large, items, 1), 1)
    twice = make_events(large, items, make_users(large, items, 1), 1)
    np.testing.assert_array_equal(again.item, twice.item)


def test_bad_settings_and_codes_are_named(world: World) -> None:
    with pytest.raises(ConfigError, match="users"):
        WorldConfig(users=0)
    with pytest.raises(ConfigError, match="noise_share"):
        WorldConfig(noise_share=1.5)
    with pytest.raises(UnknownIdError, match="no item 1500"):
        world.picture(1500)
    with pytest.raises(UnknownIdError, match="no row"):
        world.review(10**9)


def test_a_world_of_one_person() -> None:
    log = build(WorldConfig(users=1, items=48, events=5)).dataset.interactions
    assert log.n_users == 1 and len(log) >= 5
