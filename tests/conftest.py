"""Fixtures that every room's tests share."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run in parallel processes

# Tests that kill a process start it from the fork server, which has no threads (a fork of a process that has some can hang)
# and has these loaded already.
multiprocessing.set_forkserver_preload(["vouch.training", "vouch.service.server", "vouch.service.storage"])


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """A function that gives the folder of a real data set, or skips the test."""

    def find(name: str) -> Path:
        for root in os.environ.get("VOUCH_DATA", "").split(os.pathsep):
            if root and (Path(root) / name).is_dir():
                return Path(root) / name
        pytest.skip(f"real data {name!r} is not in a folder of $VOUCH_DATA")

    return find
