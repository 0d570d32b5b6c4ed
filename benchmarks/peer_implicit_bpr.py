"""Times implicit's BPR: `peer_implicit_bpr.py LOG.npz EPOCHS` prints `{"seconds": per epoch}`."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import scipy.sparse as sp
from implicit.bpr import BayesianPersonalizedRanking


def seconds(matrix: sp.csr_matrix, epochs: int) -> float:
    """Wall time of a training of `epochs`."""
    model = BayesianPersonalizedRanking(factors=64, iterations=epochs, num_threads=2, random_state=0, use_gpu=False)
    begin = time.perf_counter()
    model.fit(matrix, show_progress=False)
    return time.perf_counter() - begin


def main() -> None:
    """Subtract a short training from a long one, so that what is done once does not count."""
    log, epochs = np.load(sys.argv[1]), int(sys.argv[2])
    matrix = sp.csr_matrix((np.ones(len(log["user"]), np.float32), (log["user"], log["item"])))
    seconds(matrix, 5)
    long, short = seconds(matrix, epochs + 5), seconds(matrix, 5)
    print(json.dumps({"seconds": (long - short) / epochs}))


if __name__ == "__main__":
    main()
