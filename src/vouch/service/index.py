"""An index over item vectors (faiss), with its recall measured; and what of a run is kept for serving.

`RUN/serving/FINGERPRINT/` holds the index, item vectors that are not in the weights as they are, and later metrics. The
name ties them to the model: another model in the same folder never meets them. Whatever cannot be kept, because the
folder cannot be written, is made anew by every process.

Shapes: `B` queries, `K` interests, `D` size, `N` items, `k` results.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vouch.data import Interactions, Queries
from vouch.data.vocabulary import open_array
from vouch.errors import ConfigError, StorageError, VouchError
from vouch.files import atomic_directory, atomic_file, read_json, write_json
from vouch.recommenders.retrieval import retrieve
from vouch.recommenders.runs import OpenRun
from vouch.service.scoring import Closed, Scoring

FORMAT = 1
EXACT_UP_TO = 200_000
"""Items up to which `auto` compares with all of them."""
RECALL = 0.97
"""Recall@10 that the search effort is raised to on tuning queries; what is reported is measured on others."""
SAMPLE, TOP = 256, 10
HNSW_LINKS, HNSW_EFFORT = 32, 100
TRAIN_POINTS, TRAIN_ROUNDS = 64, 10
"""Vectors for each list that k-means reads, and its rounds."""
MOST_EFFORT = 4_096


@dataclass(frozen=True)
class Measured:
    """What an index is and how well it does.

    Attributes:
        kind: `hnsw` or `ivf`. effort: candidates kept (`efSearch`) or lists read (`nprobe`). lists: of an `ivf`.
        recall: recall@10 against comparing with all items, a mean over `queries` histories it was not tuned on.
        milliseconds: of the search for one query. build_seconds: of building and tuning.
    """

    kind: str
    effort: int
    lists: int
    recall: float
    queries: int
    milliseconds: float
    exact_milliseconds: float
    build_seconds: float


class ServingIndex:
    """Item vectors in a faiss index, for the greatest inner products.

    Inner products are searched as distances: with a further coordinate that brings all items to one length, the nearest
    item is that with the greatest product. Scores are computed from the vectors themselves.
    """

    def __init__(self, searched: Any, vectors: Tensor, measured: Measured) -> None:
        self.searched, self.vectors, self.measured = searched, vectors, measured

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and items `(B, k)` of the greatest products with `(B, D)`, best first; -inf and -1 where it found less."""
        import faiss

        points = np.zeros((len(queries), queries.shape[1] + 1), dtype=np.float32)
        points[:, :-1] = queries.numpy()
        effort = max(self.measured.effort, k)
        if self.measured.kind == "hnsw":
            settings = faiss.SearchParametersHNSW(efSearch=effort)  # type: ignore[attr-defined]
        else:
            settings = faiss.SearchParametersIVF(nprobe=self.measured.effort)  # type: ignore[call-arg]
        _, found = self.searched.search(points, k, params=settings)
        items = torch.from_numpy(found)
        scores = torch.einsum("bd,bkd->bk", queries, self.vectors[items.clamp(min=0)])
        scores.masked_fill_(items < 0, -torch.inf)
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        return scores.gather(1, order), items.gather(1, order)

    def best(self, scoring: Scoring, queries: Queries, k: int) -> tuple[Tensor, Tensor]:
        """Scores and items `(B, k)` for histories, of one or several interests."""
        return retrieve(scoring.query_vectors(queries), self, k, merge=scoring.merge)  # type: ignore[arg-type]


def open_index(
    run: Path, fingerprint: str, scoring: Scoring, log: Interactions, kind: Literal["auto", "exact", "hnsw", "ivf"]
) -> ServingIndex | None:
    """The index of a run, built and kept on first use; None where all items are to be compared.

    Raises:
        ConfigError: an index is asked for and the method has no item vectors, or faiss is not installed.
    """
    if kind == "exact" or (kind == "auto" and (scoring.vectors is None or len(scoring) <= EXACT_UP_TO)):
        return None
    if scoring.vectors is None:
        raise ConfigError(
            f"{scoring.model.card.name} does not rank by products of vectors, so there is nothing to index",
            hint="use the index exact",
        )
    try:
        import faiss
    except ImportError:
        if kind == "auto":
            warnings.warn("faiss is not installed, so all items are compared: pip install 'vouch[index]'", stacklevel=2)
            return None
        raise ConfigError(f"the index {kind} needs faiss", hint="pip install 'vouch[index]', or exact") from None
    chosen = "ivf" if kind == "auto" else kind
    folder = run / "serving" / fingerprint / chosen
    found = _kept(folder, scoring.vectors)
    if found is not None:
        return found
    with _one_at_a_time(run / "serving"):
        found = _kept(folder, scoring.vectors)  # another process may have built it meanwhile
        if found is not None:
            return found
        made = build(scoring, log, chosen)
        for left in folder.parent.glob(f".{chosen}.*.tmp"):  # by a process that was killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        try:
            with atomic_directory(folder) as aside:
                faiss.write_index(made.searched, str(aside / "index.faiss"))
                write_json(aside / "index.json", {"format": FORMAT, **asdict(made.measured)})
        except (StorageError, RuntimeError):
            return made  # it cannot be kept, only used
    _forget_others(run / "serving", fingerprint)
    return _kept(folder, scoring.vectors) or made


def build(scoring: Scoring, log: Interactions, kind: str) -> ServingIndex:
    """Build an index, raise its effort until recall@10 is good on some histories, and measure it on others."""
    import faiss

    assert scoring.vectors is not None
    begin = time.perf_counter()
    vectors = scoring.vectors
    longest = float(torch.linalg.vector_norm(vectors, dim=1).max())
    lists = 0
    searched: Any
    if kind == "hnsw":
        searched = faiss.IndexHNSWFlat(vectors.shape[1] + 1, HNSW_LINKS)
        searched.hnsw.efConstruction = HNSW_EFFORT
    else:
        lists = max(1, min(2 ** round(np.log2(2 * len(vectors) ** 0.5)), len(vectors) // 32))
        coarse = faiss.IndexFlatL2(vectors.shape[1] + 1)
        searched = faiss.IndexIVFFlat(coarse, vectors.shape[1] + 1, lists)
        searched.cp.niter, searched.cp.max_points_per_centroid = TRAIN_ROUNDS, TRAIN_POINTS
        searched.cp.min_points_per_centroid = 1
        drawn = np.random.default_rng(0).choice(len(vectors), min(len(vectors), lists * TRAIN_POINTS), replace=False)
        searched.train(_lengthened(vectors[torch.from_numpy(np.sort(drawn))], longest))
    for piece in vectors.split(1 << 17):
        searched.add(_lengthened(piece, longest))
    tuning, queries = _sample(scoring, log)
    made = ServingIndex(searched, vectors, Measured(kind, 1, lists, 0.0, 0, 0.0, 0.0, 0.0))
    wanted = _exactly(scoring, tuning)
    effort, most = (32 if kind == "hnsw" else 1), min(MOST_EFFORT, lists or MOST_EFFORT)
    while True:
        made.measured = Measured(kind, effort, lists, 0.0, 0, 0.0, 0.0, 0.0)
        if effort >= most or _recall(_found(made, scoring, tuning), wanted) >= RECALL:
            break
        effort = min(most, effort * 3 // 2 + 1)
    begun = time.perf_counter()
    found = _found(made, scoring, queries)
    searching = time.perf_counter()
    recall = _recall(found, _exactly(scoring, queries))
    done = time.perf_counter()
    each = 1_000 / len(queries)
    made.measured = Measured(
        kind,
        effort,
        lists,
        recall,
        len(queries),
        each * (searching - begun),
        each * (done - searching),
        done - begin,
    )
    return made


def _lengthened(vectors: Tensor, longest: float) -> NDArray[np.float32]:
    """`(n, D + 1)`: vectors with a coordinate that brings each to the length of the longest."""
    points = np.empty((len(vectors), vectors.shape[1] + 1), dtype=np.float32)
    points[:, :-1] = vectors.numpy()
    rest = longest**2 - np.square(points[:, :-1], dtype=np.float64).sum(1)
    points[:, -1] = np.sqrt(np.maximum(rest, 0.0))
    return points


def _sample(scoring: Scoring, log: Interactions) -> tuple[Tensor, Tensor]:
    """Query vectors of some users' histories, in two halves."""
    users = np.random.default_rng(0).permutation(np.flatnonzero(np.diff(log.offsets) > 0))[: 2 * SAMPLE]
    vectors = scoring.query_vectors(Queries.from_users(log, np.sort(users)))
    half = max(1, len(vectors) // 2)
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(vectors)))
    return vectors[order[:half]], vectors[order[-half:]]


def _found(index: ServingIndex, scoring: Scoring, queries: Tensor) -> Tensor:
    return retrieve(queries, index, TOP, merge=scoring.merge)[1]  # type: ignore[arg-type]


def _exactly(scoring: Scoring, queries: Tensor) -> Tensor:
    """The best items `(B, 10)` by comparing with all."""
    return scoring.best_of_vectors(queries, TOP, Closed.of([np.zeros(0, np.int64)] * len(queries), []))[1]


def _recall(found: Tensor, wanted: Tensor) -> float:
    real = wanted >= 0
    hit = (wanted.unsqueeze(2) == found.unsqueeze(1)).any(2) & real
    return float(hit.sum() / real.sum().clamp(min=1))


def _kept(folder: Path, vectors: Tensor) -> ServingIndex | None:
    """The kept index, by memory map; None where there is none, or it is damaged."""
    import faiss

    try:
        about = read_json(folder / "index.json")
        if about.pop("format") != FORMAT:
            return None
        measured = Measured(**about)
        flags = faiss.IO_FLAG_READ_ONLY | (faiss.IO_FLAG_MMAP if measured.kind == "ivf" else faiss.IO_FLAG_MMAP_IFC)
        searched: Any = faiss.read_index(str(folder / "index.faiss"), flags)
    except (VouchError, RuntimeError, TypeError, KeyError, AttributeError):
        return None
    if searched.ntotal != len(vectors) or searched.d != vectors.shape[1] + 1:
        return None
    if measured.kind == "ivf":  # the lists are in the page cache: threads that fetch them ahead only cost time
        lists = faiss.downcast_InvertedLists(searched.invlists)
        if hasattr(lists, "prefetch_nthread"):
            lists.prefetch_nthread = 0
    return ServingIndex(searched, vectors, measured)


def fingerprint_of(run: OpenRun) -> str:
    """A hash of the model's files and of the data's fingerprint.

    Raises:
        StorageError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(run.dataset.interactions.fingerprint.encode())
    try:
        for name in ("recommender.json", "popularity.npy", "weights.safetensors"):
            with (run.path / "model" / name).open("rb") as file:
                for piece in iter(lambda: file.read(1 << 22), b""):
                    digest.update(piece)
    except OSError as error:
        raise StorageError(f"the model cannot be read: {error.strerror}", where=str(run.path)) from error
    return digest.hexdigest()


def keep_vectors(run: Path, fingerprint: str, vectors: Tensor) -> Tensor:
    """Item vectors as a read-only map of a file: of the weights where they are a part of them, else of a copy beside it."""
    if _is_mapped(vectors):
        return vectors
    file = run / "serving" / fingerprint / "items.npy"
    try:
        if not file.exists():
            with _one_at_a_time(run / "serving"), atomic_file(file) as aside, aside.open("wb") as out:
                np.save(out, vectors.numpy())
        array = open_array(file)
    except VouchError:
        return vectors  # it cannot be kept: every process has its own
    if array.shape != tuple(vectors.shape) or not np.array_equal(array[:16], vectors[:16].numpy()):
        file.unlink(missing_ok=True)
        return keep_vectors(run, fingerprint, vectors)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it cannot be written, which is the point
        return torch.from_numpy(array)


def _is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a read-only map of a file (False where the system does not say)."""
    address = tensor.data_ptr()
    with contextlib.suppress(OSError), open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            low, high = (int(bound, 16) for bound in line.split(" ", 1)[0].split("-"))
            if low <= address < high:
                return line.split()[1].startswith("r-") and len(line.split()) > 5
    return False


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes from building the same thing; without effect where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_others(folder: Path, fingerprint: str) -> None:
    """Remove what belongs to models that are no longer there; processes that still map it keep it."""
    for other in folder.iterdir():
        if other.is_dir() and other.name != fingerprint and not other.name.startswith("."):
            shutil.rmtree(other, ignore_errors=True)
