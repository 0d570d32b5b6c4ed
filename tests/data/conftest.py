"""Writing small sources to read, and logs drawn at random."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# short logs are refused by many a split, so many examples are filtered out, and more on a busy machine
settings.register_profile(
    "data", max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)
settings.load_profile("data")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes text or bytes under a name (gzipped if it ends in .gz) and gives the path."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return make
