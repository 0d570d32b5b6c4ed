"""What of a run is used without the library: item vectors with their ids, and the query network as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vouch.errors import ConfigError
from vouch.files import atomic_directory, write_json
from vouch.service.engine import Engine

Format = Literal["vectors", "onnx"]


def export(run: Path, out: Path, format: Format) -> dict[str, Any]:
    """Write a folder, atomically: `items.npy` float32 `(n_items, D)`, `items.json` (the id of each row), `about.json`; with
    `onnx` also `query.onnx` (its weights in `query.onnx.data`), and `users.json` where it takes users.

    The score of an item is the product of its row with the query vector; of several interests, the greatest or the sum
    of the products, as `about.json` says. Where a method adds a number to an item's score, that is the last column, and
    query vectors end in 1.

    Returns:
        What `about.json` holds.

    Raises:
        ConfigError: the method does not rank by products of vectors. StorageError: the folder cannot be written.
    """
    if format not in ("vectors", "onnx"):
        raise ConfigError(f"there is no format {format!r}", hint="use vectors or onnx")
    engine = Engine.open(run, index="exact", mmap=False)
    vectors = engine.scoring.vectors
    card = engine.model.card
    if vectors is None:
        raise ConfigError(
            f"{card.name} does not rank by products of vectors, so it has none to write",
            hint="vouch score writes the recommendations of any method",
        )
    about: dict[str, Any] = {
        "method": card.slug,
        "fingerprint": engine.fingerprint,
        "items": len(vectors),
        "size": vectors.shape[1],
        "last_column": "added to the score of the item; query vectors end in 1" if engine.scoring.biased else None,
        "interests": engine.scoring.merge if getattr(engine.model, "network", None) is not None else "max",
        "exclude": "items of the history are to be left out of the results by whoever searches",
    }
    if out.exists() and not (out / "about.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{str(out)!r} exists and is no export", hint="choose another --out")
    with atomic_directory(out) as aside:
        np.save(aside / "items.npy", np.ascontiguousarray(vectors.numpy()))
        _write_ids(aside / "items.json", engine.items)
        if format == "onnx":
            from vouch.service.onnx import export_onnx

            about["onnx"] = export_onnx(engine.scoring, aside / "query.onnx")
            if "user" in about["onnx"]["inputs"]:
                _write_ids(aside / "users.json", engine.users)
        write_json(aside / "about.json", about)
    return about


def _write_ids(file: Path, vocabulary: Any) -> None:
    file.write_text(json.dumps(vocabulary.ids(np.arange(len(vocabulary))), ensure_ascii=False), encoding="utf-8")
