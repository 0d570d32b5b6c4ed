"""Putting the world together, whole in memory or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vouch.data.catalog import Catalog
from vouch.data.dataset import Dataset
from vouch.data.interactions import Interactions
from vouch.data.vocabulary import Vocabulary
from vouch.data.world import text
from vouch.data.world.config import WorldConfig, check_known, stream
from vouch.data.world.events import Events, first_user, make_events
from vouch.data.world.items import BRANDS, CATEGORIES, COLOURS, DOMAINS, Items, make_items
from vouch.data.world.pictures import draw
from vouch.data.world.truth import Truth
from vouch.data.world.users import SCENARIOS, Users, join, make_users, n_blocks
from vouch.files import atomic_directory, atomic_file

SCHEMA = {
    "user": pl.Int64, "item": pl.Int64, "time": pl.Int64, "value": pl.Float32, "scenario": pl.String,
    "domain": pl.String, "click": pl.Float32, "like": pl.Float32, "watch_time": pl.Float32,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class World:
    """A dataset and the truth behind it. Ids count from 1: the id of user or item code `c` is `c + 1`."""

    config: WorldConfig
    dataset: Dataset
    truth: Truth

    def picture(self, item: int, size: int = 128) -> Any:
        """The picture of an item code, a square Pillow image."""
        items = self.truth.items
        code = check_known(item, self.config.items, "item")
        colour = list(COLOURS.values())[int(items.colour[code])]
        return draw(CATEGORIES[int(items.category[code])], colour, int(items.brand[code]), code, size)

    def write_pictures(self, folder: Path | str, size: int = 128) -> World:
        """Draw every picture into a folder, and name the files in the catalogue's `picture` column."""
        names = [f"{code + 1}.png" for code in range(self.config.items)]
        with atomic_directory(folder) as aside:
            for code, name in enumerate(names):
                self.picture(code, size).save(aside / name)
        old = self.dataset.catalog
        table = old.table.with_columns(pl.Series("picture", names))
        catalog = Catalog(old.items, table, {**old.roles, "picture": "media"}, old.features, Path(folder))
        dataset = Dataset(self.dataset.interactions, catalog, self.dataset.users, self.dataset.name)
        return World(self.config, dataset, self.truth)

    def review(self, row: int) -> str:
        """The review of an event, by its row in the log."""
        log = self.dataset.interactions
        row = check_known(row, len(log), "row")
        assert log.value is not None
        return text.review(self.truth.items, int(log.item[row]), int(log.user[row]), row, float(log.value[row]))

    def aspects(self, row: int) -> list[str]:
        """What the review of an event speaks of."""
        log = self.dataset.interactions
        row = check_known(row, len(log), "row")
        return text.review_aspects(int(log.item[row]), int(log.user[row]), row)


def build(config: WorldConfig | None = None) -> World:
    """Simulate a world in memory; the default takes about a second."""
    config = config or WorldConfig()
    items = make_items(config)
    people: list[Users] = []
    parts: list[Events] = []
    for block in range(n_blocks(config)):
        people.append(make_users(config, items, block))
        parts.append(make_events(config, items, people[-1], block))
    users = join(people)

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    user = np.concatenate([part.user + first_user(block) for block, part in enumerate(parts)])
    log = Interactions.from_codes(
        Vocabulary.of_numbers(np.arange(1, config.users + 1)),
        Vocabulary.of_numbers(np.arange(1, config.items + 1)),
        user,
        column("item"),
        columns={name: column(name) for name in ("time", "value", "scenario", "domain")},
        feedback={name: np.concatenate([part.feedback[name] for part in parts]) for name in parts[0].feedback},
        labels={"scenario": list(SCENARIOS), "domain": list(DOMAINS)},
        notes={"source": "the embedded world", "world": config.model_dump(mode="json")},
    )
    # Blocks are sorted by user and time already, and sorting is stable: rows keep their places.
    truth = Truth(
        config,
        items,
        users,
        *(column(name) for name in ("is_noise", "is_repeat", "interest", "position", "life", "expected_value")),
    )
    return World(config, Dataset(log, _catalog(config, items, log.items), _people(users), "world"), truth)


def write_log(config: WorldConfig, path: Path | str) -> Path:
    """Stream the world's log to one Parquet file in constant memory; the same rows as `build`, in the same order.

    Raises:
        StorageError: the file cannot be written.
    """
    items = make_items(config)

    def blocks(*_: Any) -> Iterator[pl.DataFrame]:
        for block in range(n_blocks(config)):
            events = make_events(config, items, make_users(config, items, block), block)
            yield pl.DataFrame(
                {
                    "user": events.user + first_user(block) + 1,
                    "item": events.item + 1,
                    "time": events.time,
                    "value": events.value,
                    "scenario": pl.Series(np.array(SCENARIOS, dtype=object)[events.scenario], dtype=pl.String),
                    "domain": pl.Series(np.array(DOMAINS, dtype=object)[events.domain], dtype=pl.String),
                    **events.feedback,
                },
                schema=SCHEMA,
            )

    from polars.io.plugins import register_io_source

    with atomic_file(path) as aside:
        register_io_source(io_source=blocks, schema=SCHEMA).sink_parquet(aside)
    return Path(path)


def _catalog(config: WorldConfig, items: Items, vocabulary: Vocabulary) -> Catalog:
    """Attributes as a shop would have them; the style is seen through noise, as a picture or a text would show it."""
    random = stream(config, 4)
    brands = [BRANDS[domain][brand] for domain, brand in zip(items.domain, items.brand, strict=True)]
    colours = text.colour_names()
    table = pl.DataFrame(
        {
            "title": [text.title(items, code) for code in range(config.items)],
            "category": [CATEGORIES[code] for code in items.category],
            "brand": brands,
            "colour": [colours[code] for code in items.colour],
            "domain": [DOMAINS[code] for code in items.domain],
            "price": items.price,
        }
    )
    roles = {"title": "title", "category": "category", "brand": "category", "colour": "category", "domain": "category"}
    rgb = np.array(list(COLOURS.values()), dtype=np.float32)[items.colour] / 255
    shapes = random.normal(size=(len(CATEGORIES), 13)).astype(np.float32)
    image = np.concatenate([rgb, shapes[items.category]], axis=1)
    features = {
        "style": (items.style + 0.5 * random.normal(size=items.style.shape)).astype(np.float32),
        "image": (image + 0.1 * random.normal(size=image.shape)).astype(np.float32),
    }
    return Catalog(vocabulary, table, {**roles, "price": "number"}, features)


def _people(users: Users) -> pl.DataFrame:
    shops = np.where(users.home & users.fashion, "both", np.where(users.home, "home", "fashion"))
    return pl.DataFrame({"shops": shops.astype(str)})
