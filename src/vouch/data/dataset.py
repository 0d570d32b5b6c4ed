"""A dataset: the log, the catalogue and, where known, a table of users."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl

from vouch.data.catalog import Catalog
from vouch.data.interactions import Interactions, read_header
from vouch.errors import DataError
from vouch.files import atomic_directory, write_json

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Interactions with the catalogue of their items and, optionally, a polars table of users (row `u` is code `u`).

    `origin` is the folder it was opened from, if it was; what is derived from it may be kept there.
    """

    interactions: Interactions
    catalog: Catalog
    users: pl.DataFrame | None = None
    name: str = "data"
    origin: Path | None = None

    def __post_init__(self) -> None:
        if self.catalog.items != self.interactions.items:
            raise DataError("the catalogue and the log number their items differently")
        if self.users is not None and self.users.height != self.interactions.n_users:
            raise DataError(f"the table of users has {self.users.height} rows for {self.interactions.n_users} users")

    @classmethod
    def of(cls, interactions: Interactions, *, name: str = "data") -> Dataset:
        """A dataset with an empty catalogue."""
        return cls(interactions, Catalog.empty(interactions.items), None, name)

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, {self.interactions!r}, {self.catalog!r})"

    def with_interactions(self, interactions: Interactions) -> Dataset:
        """The same dataset over another log with the same vocabularies."""
        return replace(self, interactions=interactions)

    def save(self, path: Path | str) -> None:
        """Write as one folder, atomically: `log/`, `catalog/`, `users.parquet`, `dataset.json`."""
        with atomic_directory(path) as aside:
            self.interactions.save(aside / "log")
            self.catalog.save(aside / "catalog")
            if self.users is not None:
                self.users.write_parquet(aside / "users.parquet")
            write_json(aside / "dataset.json", {"format": FORMAT, "name": self.name})

    @classmethod
    def open(cls, path: Path | str) -> Dataset:
        """Open a saved dataset; the log and the features by memory map.

        Raises:
            DataError: the folder is not a prepared dataset, is damaged, or was written by a newer version.
        """
        path = Path(path)
        if not (path / "dataset.json").exists():
            raise DataError(
                f"{path.name!r} is not a prepared dataset",
                where=str(path),
                hint="make one with: vouch data prepare SOURCE --out FOLDER",
            )
        header = read_header(path / "dataset.json", FORMAT)
        try:
            users = pl.read_parquet(path / "users.parquet") if (path / "users.parquet").exists() else None
        except (pl.exceptions.PolarsError, OSError) as error:
            raise DataError(
                f"the table of users is damaged: {error}", where=str(path), hint="prepare the data again"
            ) from error
        return cls(
            Interactions.open(path / "log"),
            Catalog.open(path / "catalog"),
            users,
            str(header.get("name", "data")),
            path,
        )
