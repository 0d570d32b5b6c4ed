"""Run in RecBole's environment: its evaluation of given scores, timed. Prints one line of JSON.

python peer_recbole_evaluation.py GIVEN.npz CUT [CUT ...]

`GIVEN.npz` holds `scores` (users, items), and the `item` and `offsets` of histories and the `target` items (users, T).
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

for name, alias in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_")):
    if not hasattr(np, name):
        setattr(np, name, getattr(np, alias))
for name, kind in (("float", float), ("int", int), ("bool", bool), ("object", object), ("bool8", np.bool_)):
    if name not in np.__dict__:
        setattr(np, name, kind)

import torch  # noqa: E402
from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.evaluator import Collector, Evaluator  # noqa: E402
from recbole.model.abstract_recommender import GeneralRecommender  # noqa: E402
from recbole.trainer import Trainer  # noqa: E402
from recbole.utils import InputType  # noqa: E402

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)
TOP = ["ndcg", "hit", "recall", "precision", "mrr", "map"]
METRICS = [*TOP, "gauc", "itemcoverage", "giniindex", "averagepopularity", "shannonentropy"]
SETTINGS = {
    "metrics": METRICS,
    "metric_decimal_place": 12,
    "device": "cpu",
    "use_gpu": False,
    "state": "ERROR",
    "show_progress": False,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
}


class Given(GeneralRecommender):
    """A model whose scores are known beforehand."""

    input_type = InputType.PAIRWISE

    def __init__(self, config: Config, dataset: object, scores: torch.Tensor) -> None:
        super().__init__(config, dataset)
        self.scores = scores
        self.unused = torch.nn.Parameter(torch.zeros(1))  # the trainer wants something to optimise

    def full_sort_predict(self, interaction: dict) -> torch.Tensor:
        """The rows of the users asked for."""
        return self.scores.index_select(0, interaction[self.USER_ID])


def whole(given: dict, cuts: list[int], **settings: object) -> tuple[float, dict]:
    """Time `Trainer.evaluate` with RecBole's own data loader, as its users run it."""
    users, items = given["scores"].shape
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "given" / "given.inter"
        file.parent.mkdir()
        with file.open("w") as lines:
            lines.write("user_id:token\titem_id:token\ttimestamp:float\n")
            for user in range(users):
                history = given["item"][given["offsets"][user] : given["offsets"][user + 1]]
                for moment, item in enumerate([*history, given["target"][user, 0]]):
                    lines.write(f"{user}\t{item}\t{moment}\n")
        fixed = {**SETTINGS, "topk": cuts, "data_path": folder, "checkpoint_dir": folder, **settings}
        config = Config(model="BPR", dataset="given", config_dict=fixed)
        dataset = create_dataset(config)
        train, _, test = data_preparation(config, dataset)
        if dataset.user_num != users + 1 or dataset.item_num != items + 1:
            raise SystemExit("a user or an item has no event")
        rows = [int(token) for token in dataset.field2id_token["user_id"][1:]]
        columns = [int(token) for token in dataset.field2id_token["item_id"][1:]]
        scores = torch.zeros(users + 1, items + 1)
        scores[1:, 1:] = torch.from_numpy(given["scores"][np.ix_(rows, columns)])
        trainer = Trainer(config, Given(config, train.dataset, scores))
        trainer.eval_collector.data_collect(train)
        held = trainer.eval_collector.data_struct._data_dict
        held["data.num_items"], held["data.count_items"] = (
            Number(held["data.num_items"]),
            Counts(held["data.count_items"]),
        )
        seconds = []
        for _ in range(4):
            begin = time.process_time()
            result = trainer.evaluate(test, load_best_model=False)
            seconds.append(time.process_time() - begin)
    return float(np.median(seconds[1:])), {key: float(value) for key, value in result.items()}


def core(given: dict, cuts: list[int]) -> tuple[float, dict]:
    """Time RecBole's collector and evaluator alone, all users in one batch, indices made beforehand: its best case."""
    users, items = given["scores"].shape
    # RecBole keeps item 0 for padding.
    scores = torch.from_numpy(np.hstack([np.zeros((users, 1), np.float32), given["scores"]]))
    row = torch.repeat_interleave(torch.arange(users), torch.from_numpy(np.diff(given["offsets"])))
    column = torch.from_numpy(given["item"].astype(np.int64) + 1)
    positive_u = torch.repeat_interleave(torch.arange(users), given["target"].shape[1])
    positive_i = torch.from_numpy(given["target"].astype(np.int64).reshape(-1) + 1)
    config = {**SETTINGS, "topk": cuts, "device": torch.device("cpu")}
    counts = Counts(collections.Counter(column.tolist()))
    seconds = []
    for _ in range(6):
        collector, evaluator = Collector(config), Evaluator(config)
        collector.data_struct.set("data.num_items", Number(items + 1))
        collector.data_struct.set("data.count_items", counts)
        begin = time.process_time()
        block = scores.clone()
        block[:, 0] = -np.inf
        block[row, column] = -np.inf
        collector.eval_batch_collect(block, None, positive_u, positive_i)
        result = evaluator.evaluate(collector.get_data_struct())
        seconds.append(time.process_time() - begin)
    return float(np.median(seconds[1:])), {key: float(value) for key, value in result.items()}


class Number(int):
    """An int with the `.cpu()` that the collector calls on all it holds, though this is no tensor (1.2.1)."""

    def cpu(self) -> int:
        """Itself."""
        return self


class Counts(dict):
    """A dict with the `.cpu()` that the collector calls."""

    def cpu(self) -> dict:
        """Itself."""
        return self


def main() -> None:
    """Evaluate as it comes (one target a user only), and in its best case."""
    given, cuts = dict(np.load(sys.argv[1])), [int(cut) for cut in sys.argv[2:]]
    sys.argv[1:] = []  # RecBole reads them too
    core_seconds, metrics = core(given, cuts)
    result = {"core_seconds": core_seconds, "metrics": metrics}
    if given["target"].shape[1] == 1:
        result["seconds"], result["metrics"] = whole(given, cuts)
        result["large_batch_seconds"], _ = whole(given, cuts, eval_batch_size=given["scores"].size * 2)
        for name, value in metrics.items():  # average popularity aside: `core` counts the validation events too
            if not name.startswith("averagepop") and abs(result["metrics"][name] - value) > 1e-9:
                raise SystemExit(f"{name}: {result['metrics'][name]} and {value} with the same scores")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
