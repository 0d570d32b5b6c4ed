from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_data, small_run

from vouch.errors import ConfigError
from vouch.nn.topk import top_k
from vouch.service import index as indexes
from vouch.service import scoring as scorings
from vouch.service.engine import Engine, Question
from vouch.service.index import ServingIndex
from vouch.service.scoring import Closed

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over more than a thousand items."""
    return small_run(tmp_path_factory.mktemp("index") / "run", "sasrec", small_data(None, 300, 1_200))


@pytest.fixture(scope="module", params=["ivf", "hnsw"])
def engine(request: pytest.FixtureRequest, run: Path) -> Engine:
    return Engine.open(run, index=request.param)


@pytest.fixture(scope="module")
def exact(run: Path) -> Engine:
    return Engine.open(run, index="exact")


def items(answers: Any) -> list[list[str]]:
    return [[each.item for each in answer] for answer in answers]


def overlap(found: Any, wanted: Any) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(items(found), items(wanted), strict=True)]))


def test_the_recall_in_the_card_is_that_of_users(engine: Engine, exact: Engine) -> None:
    """Against comparing with all items, over all users: what the card says, which is good."""
    told = engine.card()["index"]
    assert told["recall"] >= 0.95 and told["queries"] == 150 and told["kind"] in ("ivf", "hnsw")
    questions = [Question(None, engine.history(f"u{u}"), 10, repeat=True) for u in range(300)]
    measured = overlap(engine.recommend(questions), exact.recommend(questions))
    assert abs(measured - told["recall"]) < 0.03


def test_scores_are_exact_and_in_order(engine: Engine, exact: Engine) -> None:
    question = Question(None, ["i3", "i9"], 10)
    found, wanted = engine.recommend([question])[0], exact.recommend([Question(None, ["i3", "i9"], 1_000)])[0]
    score = {each.item: each.score for each in wanted}
    np.testing.assert_allclose([each.score for each in found], [score[each.item] for each in found], rtol=1e-4)
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert not {"i3", "i9"} & {each.item for each in found}


def test_filters_and_exclusions_are_kept_and_full_lists_given(engine: Engine, exact: Engine, monkeypatch: Any) -> None:
    """Soft filters are searched for with more than asked; hard ones, and long exclusions, by comparing with all items."""
    asked: list[int] = []
    whole = ServingIndex.best
    monkeypatch.setattr(ServingIndex, "best", lambda self, s, q, k: asked.append(k) or whole(self, s, q, k))
    n = engine.n_items
    few, half = np.zeros(n, bool), np.zeros(n, bool)
    few[[7, 90, 400]] = True
    half[::2] = True
    best = items(exact.recommend([Question(history=["i3"], k=40)]))[0]
    questions = [
        Question(history=["i3"], k=10, allowed=half),
        Question(history=["i3"], k=3, allowed=few),
        Question(history=["i3"], k=10, exclude=best[:30]),
        Question(history=["i3"], k=n - 1),
        Question(history=[], k=5),
    ]
    found, wanted = engine.recommend(questions), exact.recommend(questions)
    assert [len(each) for each in found] == [10, 3, 10, n - 1, 5]
    assert items(found)[1] == items(wanted)[1]  # exactly
    assert items(found)[3:] == items(wanted)[3:]
    assert overlap(found, wanted) > 0.9
    assert {engine.items.code(item) % 2 for item in items(found)[0]} == {0}
    assert not set(items(found)[2]) & set(best[:30])
    assert asked == []  # the question for all items makes the whole batch exact
    engine.recommend(questions[:2])
    assert len(asked) == 1 and 20 <= asked[0] <= 100  # the hard filter was not searched for


def test_several_interests_are_searched_together(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run", "comirec-sa", small_data(None, 200, 600))
    found, wanted = Engine.open(path, index="hnsw"), Engine.open(path, index="exact")
    assert found.scoring.query_vectors(found._resolve([Question(history=["i3"])])[0]).dim() == 3
    questions = [Question(None, found.history(f"u{u}"), 10) for u in range(50)]
    assert overlap(found.recommend(questions), wanted.recommend(questions)) > 0.95


def test_what_a_method_adds_to_an_items_score_counts_in_the_index(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run", "sasrec", small_data(None, 200, 600), item_bias=True)
    model = Engine.open(path, mmap=False).model
    with torch.no_grad():  # a bias that decides everything
        model.network.bias.copy_(torch.arange(model.n_items) % 97 * 10.0)
    model.save(path / "model")
    found, wanted = Engine.open(path, index="hnsw"), Engine.open(path, index="exact")
    assert found.scoring.biased
    question = [Question(history=["i3"], k=5)]
    assert items(found.recommend(question)) == items(wanted.recommend(question))
    assert {found.items.code(item) % 97 for item in items(wanted.recommend(question))[0]} <= {95, 96}


def test_it_is_built_once_and_kept_with_the_model(run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "serving", ignore_errors=True)
    built: list[str] = []
    whole = indexes.build
    monkeypatch.setattr(indexes, "build", lambda s, log, kind: built.append(kind) or whole(s, log, kind))
    first = Engine.open(path, index="ivf")
    assert first.index is not None and built == ["ivf"]
    again = Engine.open(path, index="ivf")
    assert built == ["ivf"]
    questions = [Question(None, first.history(f"u{u}"), 10) for u in range(20)]
    assert items(first.recommend(questions)) == items(again.recommend(questions))
    # a damaged one is built again, and what a killed process left is swept away
    (left,) = (each / ".ivf.0123abcd.tmp" for each in (path / "serving").iterdir() if each.is_dir())
    left.mkdir()
    (file,) = (path / "serving").glob("*/ivf/index.faiss")
    file.write_bytes(file.read_bytes()[:-1_000])
    Engine.open(path, index="ivf")
    (about,) = (path / "serving").glob("*/ivf/index.json")
    about.write_text("{")
    Engine.open(path, index="ivf")
    assert built == ["ivf"] * 3 and not left.exists()
    # and another model in the same folder gets its own, in place of the old
    model = Engine.open(path, mmap=False).model
    model.popularity = model.popularity + 1  # type: ignore[operator]
    model.save(path / "model")
    other = Engine.open(path, index="ivf")
    assert other.fingerprint != first.fingerprint and built == ["ivf"] * 4
    assert [each.name for each in (path / "serving").iterdir() if each.is_dir()] == [other.fingerprint]
    assert items(first.recommend(questions)) == items(again.recommend(questions))  # what is open stays


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_served_all_the_same(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "serving", ignore_errors=True)
    path.chmod(0o500)
    try:
        assert Engine.open(path, index="ivf").index is not None
    finally:
        path.chmod(0o700)


def test_a_file_in_the_way_does_not_stop_the_service(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(run, path)
    shutil.rmtree(path / "serving", ignore_errors=True)
    (path / "serving").write_text("not a folder")
    engine = Engine.open(path, index="ivf")
    assert engine.index is not None and len(engine.recommend([Question(history=["i3"])])[0]) == 10


def test_an_index_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = small_run(tmp_path / "run", "itemknn")
    with pytest.raises(ConfigError, match="nothing to index"):
        Engine.open(path, index="hnsw")
    assert Engine.open(path, index="auto").index is None


def test_auto_takes_an_index_for_large_catalogues(run: Path, monkeypatch: Any) -> None:
    assert Engine.open(run).index is None
    monkeypatch.setattr(indexes, "EXACT_UP_TO", 1_000)
    opened = Engine.open(run)
    assert opened.index is not None and opened.card()["index"]["kind"] == "ivf"


def test_tiles_give_the_best_whatever_their_size_and_ties(exact: Engine, monkeypatch: Any) -> None:
    """Vectors of small whole numbers tie all the time; the smaller item wins, in any tile."""
    random, n = np.random.default_rng(0), exact.n_items
    scoring = Engine.open(exact.run.path, index="exact").scoring
    scoring.vectors = torch.from_numpy(random.integers(-2, 3, size=(n, 3)).astype(np.float32))
    queries = torch.from_numpy(random.integers(-2, 3, size=(9, 3)).astype(np.float32))
    queries[4] = torch.tensor([0.3, 1.7, -0.9])  # hardly a tie
    masks: list[Any] = [None] * 9
    masks[2] = random.random(n) < 0.02
    shut = [random.integers(0, n, size=size).astype(np.int64) for size in (0, 5, 3, 0, 700, 1, 0, 2, 0)]
    wanted = scoring.product(queries, scoring.vectors)
    wanted[~queries.any(1)] = scoring.popularity
    for row in range(9):
        wanted[row, shut[row]] = -torch.inf
        if masks[row] is not None:
            wanted[row, ~masks[row]] = -torch.inf
    values, order = top_k(wanted, 40)
    for cells in (9 * 64, 9 * 100, 1 << 20):
        monkeypatch.setattr(scorings, "TILE_CELLS", cells)
        value, item = scoring.best_of_vectors(queries, 40, Closed.of(shut, masks))
        assert torch.equal(value, values)
        assert torch.equal(item, order.masked_fill(torch.isneginf(values), -1))


@pytest.mark.parametrize(("columns", "k"), [(1_000, 3), (1_007, 11), (640, 10), (639, 10), (50, 10), (5_003, 60)])
def test_the_largest_are_found_in_the_groups_of_the_greatest_maxima(columns: int, k: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(7, columns, generator=generator)
    scores[1] = torch.arange(columns, dtype=torch.float32)  # the largest side by side, and in what is left over
    scores[2] = -scores[1]
    scores[3, scores[3] < 2] = -torch.inf
    scores[4] = (scores[4] * 2).round()  # ties everywhere
    scores[5] = -torch.inf
    value, column = scorings.largest(scores, k)
    assert torch.equal(value, torch.topk(scores, k).values)
    assert torch.equal(scores.gather(1, column), value)
    assert all(len(set(row.tolist())) == k for row in column)


def mapped(path: Path) -> tuple[int, int]:
    """KiB of the files in a folder that are mapped: once, and more than once (by this or another process)."""
    once = more = 0
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ", 1)[0]
        if not first.endswith(":"):
            inside = str(path) in line
        elif inside and first in ("Private_Clean:", "Private_Dirty:"):
            once += int(line.split()[1])
        elif inside and first in ("Shared_Clean:", "Shared_Dirty:"):
            more += int(line.split()[1])
    return once, more


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is shared")
def test_whoever_opens_the_model_again_shares_it(tmp_path: Path) -> None:
    """A second engine costs no copy of the vectors, as the system counts; so it is in another process."""
    path = small_run(tmp_path / "run", "bpr", small_data(None, 400, 2_000), hidden_size=256, epochs=1)
    engines = [Engine.open(path, index="exact") for _ in range(2)]
    for engine in engines:
        assert engine.scoring.vectors is not None
        engine.scoring.vectors.sum()
    size = engines[0].scoring.vectors.nbytes // 1024  # type: ignore[union-attr]
    once, more = mapped(path / "model")
    assert size > 1_500
    assert more >= 2 * 0.9 * size and once < 0.1 * size


def test_the_card_measures_the_index(engine: Engine) -> None:
    json.dumps(engine.card())
    about = json.loads(next((engine.run.path / "serving").glob("*/*/index.json")).read_text())
    assert about["recall"] >= 0.95


def test_without_faiss_one_is_told(run: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="needs faiss") as caught:
        Engine.open(run, index="hnsw")
    assert "vouch[index]" in str(caught.value.hint)
    monkeypatch.setattr(indexes, "EXACT_UP_TO", 1_000)
    with pytest.warns(UserWarning, match="all items are compared"):
        assert Engine.open(run).index is None
