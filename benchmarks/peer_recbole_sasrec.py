"""Run in RecBole's environment: train its SASRec, timed by epoch. Prints one line of JSON.

python peer_recbole_sasrec.py FOLDER BATCH SECONDS SEED

FOLDER holds `given/given.inter`. Training stops at the end of the epoch in which SECONDS have passed.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import numpy as np

for name, alias in (("float_", "float64"), ("complex_", "complex128"), ("unicode_", "str_"), ("bool8", "bool_")):
    if not hasattr(np, name):
        setattr(np, name, getattr(np, alias))

import torch  # noqa: E402
from recbole.config import Config  # noqa: E402
from recbole.data import create_dataset, data_preparation  # noqa: E402
from recbole.model.sequential_recommender import SASRec  # noqa: E402
from recbole.trainer import Trainer  # noqa: E402
from recbole.utils import init_seed  # noqa: E402

torch.set_num_threads(2)
logging.disable(logging.CRITICAL)


def main() -> None:
    """Train, validate after each epoch, print."""
    folder, (batch, limit, seed) = sys.argv[1], map(int, sys.argv[2:])
    settings = {
        "data_path": folder,
        "checkpoint_dir": folder,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "user_inter_num_interval": "[0,inf)",
        "item_inter_num_interval": "[0,inf)",
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "train_neg_sample_args": None,
        "loss_type": "CE",
        "MAX_ITEM_LIST_LENGTH": 50,
        "n_layers": 2, "n_heads": 2, "hidden_size": 64, "inner_size": 256,
        "hidden_dropout_prob": 0.2, "attn_dropout_prob": 0.2,
        "train_batch_size": batch, "eval_batch_size": 1 << 20,
        "metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "metric_decimal_place": 6,
        "seed": seed, "use_gpu": False, "show_progress": False, "nproc": 1, "save_dataset": False,
    }  # fmt: skip
    sys.argv = sys.argv[:1]  # RecBole reads it
    config = Config(model="SASRec", dataset="given", config_dict=settings)
    init_seed(seed, True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    model = SASRec(config, train.dataset).to(config["device"])
    trainer = Trainer(config, model)
    seconds, values, begin = [], [], time.perf_counter()
    while not seconds or time.perf_counter() - begin < limit:
        start = time.perf_counter()
        trainer._train_epoch(train, len(seconds), show_progress=False)
        seconds.append(time.perf_counter() - start)
        values.append(float(trainer._valid_epoch(valid)[0]))
        print(len(seconds), seconds[-1], values[-1], file=sys.stderr, flush=True)
    print(json.dumps({"seconds": seconds, "valid": values, "rows": len(train.dataset)}))


if __name__ == "__main__":
    main()
