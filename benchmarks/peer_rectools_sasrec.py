"""Run in RecTools' environment: train its SASRecModel, timed by epoch. Prints one line of JSON.

python peer_rectools_sasrec.py LOG.npz ROUNDS EPOCHS_A_ROUND BATCH SEED

After each round the validation cases are ranked; the test cases once, with the weights of the best round.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel

warnings.filterwarnings("ignore")
torch.set_num_threads(2)


class Clock(Callback):
    """Seconds of each epoch."""

    seconds: list[float] = []

    def on_train_epoch_start(self, *args: object) -> None:
        """Start."""
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, *args: object) -> None:
        """Stop."""
        self.seconds.append(time.perf_counter() - self.begin)


def trainer() -> Trainer:
    """RecTools' own trainer with the clock, for any number of epochs."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Trainer(max_epochs=1, min_epochs=1, enable_checkpointing=False, devices=1, callbacks=[Clock()], **quiet)


def dataset(frame: pd.DataFrame) -> Dataset:
    """In RecTools' form; an event's time is its place in the history."""
    day = pd.Timestamp("2000-01-01") + pd.to_timedelta(frame["place"], unit="s")
    columns = {Columns.User: frame["user"], Columns.Item: frame["item"], Columns.Weight: 1.0, Columns.Datetime: day}
    return Dataset.construct(pd.DataFrame(columns))


def ndcg(model: SASRecModel, history: pd.DataFrame, asked: pd.DataFrame) -> float:
    """NDCG@10 of one target a user, all items ranked, the history excluded."""
    found = model.recommend(
        asked["user"].to_numpy(), dataset(history), k=10, filter_viewed=True, on_unsupported_targets="warn"
    )
    both = found.merge(asked, left_on=[Columns.User, Columns.Item], right_on=["user", "item"])
    return float((1 / np.log2(both[Columns.Rank] + 1)).sum() / len(asked))


def main() -> None:
    """Train, rank, print."""
    path, (rounds, each, batch, seed) = sys.argv[1], map(int, sys.argv[2:])
    given = np.load(path)
    frame = pd.DataFrame({name: given[name] for name in ("user", "item", "place", "part")})
    train, valid, test = (frame[frame.part == part] for part in range(3))
    seed_everything(seed)
    model = SASRecModel(
        n_factors=64, n_blocks=2, n_heads=2, session_max_len=50, loss="softmax", dropout_rate=0.2, lr=1e-3,
        batch_size=batch, get_trainer_func=trainer,
    )  # fmt: skip
    learned = dataset(train)
    best, kept, curve = -1.0, None, []
    for _ in range(rounds):
        model.fit_partial(learned, min_epochs=each, max_epochs=each)
        value = ndcg(model, train, valid)
        curve.append(value)
        if value > best:
            best, kept = value, copy.deepcopy(model.lightning_model.state_dict())
    model.lightning_model.load_state_dict(kept)
    tested = ndcg(model, pd.concat([train, valid]), test)
    print(json.dumps({"seconds": Clock.seconds, "valid": curve, "test": tested}))


if __name__ == "__main__":
    main()
