from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import small_data, small_run

from vouch import registry
from vouch.claims.ledger import read_ledger
from vouch.data import Queries, Query
from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError
from vouch.evaluation import evaluate
from vouch.recommenders import Recommender
from vouch.recommenders.reasons import why
from vouch.service.card import measure
from vouch.service.engine import Engine, Question

SLUGS = [slug for slug, kind in registry.methods().items() if issubclass(kind, Recommender)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


_engines: dict[str, Engine] = {}


@pytest.fixture(params=SLUGS)
def engine(request: pytest.FixtureRequest, folder: Path) -> Engine:
    slug = request.param
    if slug not in _engines:
        _engines[slug] = Engine.open(small_run(folder / slug, slug))
    return _engines[slug]


@pytest.fixture(scope="module")
def sasrec(folder: Path) -> Engine:
    if "sasrec" not in _engines:
        _engines["sasrec"] = Engine.open(small_run(folder / "sasrec", "sasrec"))
    return _engines["sasrec"]


def filter_of(attribute: str, *, equals: Any = None, among: Any = None, low: Any = None, high: Any = None) -> Any:
    return SimpleNamespace(attribute=attribute, equals=equals, in_=among, min=low, max=high)


def test_answers_are_those_of_the_model(engine: Engine) -> None:
    """Known users, strangers with a history, nobody; alone and together; with repeats, exclusions and a mask."""
    known = [Query(user=f"u{u}") for u in (0, 5, 7)]
    bare = [Query(history=["i3"]), Query(history=["i3", "i9", "i3"]), Query(history=[])]
    ranking = engine.model.recommend([*known, *bare], 6, log=engine.log)
    questions = [Question(q.user, engine.history(q.user) if q.user else q.history, 6) for q in (*known, *bare)]
    answers = engine.recommend(questions)
    for row, answer in enumerate(answers):
        assert [each.item for each in answer] == [str(item) for item in engine.items.ids(ranking.item[row])]
        np.testing.assert_allclose([each.score for each in answer], ranking.score[row], rtol=1e-4, atol=1e-5)
        assert all(each.fallback == bool(ranking.fallback[row]) for each in answer)
    alone = engine.recommend(questions[1:2])[0]
    assert [each.item for each in alone] == [each.item for each in answers[1]]

    candidates = np.arange(0, 40, 3)
    allowed = np.zeros(engine.n_items, bool)
    allowed[candidates] = True
    some = engine.model.recommend(known, 5, candidates=candidates, log=engine.log)
    masked = engine.recommend([Question(q.user, engine.history(q.user), 5, allowed=allowed) for q in known])
    for row, answer in enumerate(masked):
        wanted = some.item[row][some.item[row] >= 0]
        assert [each.item for each in answer] == [str(item) for item in engine.items.ids(wanted)]
    again = engine.model.recommend(known, 5, exclude="none", log=engine.log)
    repeated = engine.recommend([Question(q.user, engine.history(q.user), 5, repeat=True) for q in known])
    for row, answer in enumerate(repeated):
        assert [each.item for each in answer] == [str(item) for item in engine.items.ids(again.item[row])]
    shut = [each.item for each in repeated[0][:3]]
    others = engine.recommend([Question("u0", engine.history("u0"), 5, exclude=shut, repeat=True)])[0]
    assert [each.item for each in others][:2] == [each.item for each in repeated[0][3:]]


def test_similar_items_are_those_of_the_model(engine: Engine) -> None:
    try:
        expected = engine.model.similar("i3", 6)
    except ConfigError:
        with pytest.raises(ConfigError, match="no item-to-item similarity"):
            engine.similar("i3", 6)
        return
    found = engine.similar("i3", 6)
    np.testing.assert_allclose([each.score for each in found], [value for _, value in expected], rtol=1e-4, atol=1e-6)
    assert sum(each.item == item for each, (item, _) in zip(found, expected, strict=True)) >= 5  # but for ties
    allowed = np.zeros(engine.n_items, bool)
    allowed[[4, 5]] = True
    assert {each.item for each in engine.similar("i3", 6, allowed)} == {
        str(engine.items.id(4)),
        str(engine.items.id(5)),
    }


def test_reasons_are_those_of_removal(engine: Engine) -> None:
    history = ["i3", "i9", "i3", "i11", "i1"]
    best = [each.item for each in engine.recommend([Question(history=history, k=3)])[0]]
    codes = engine.codes(history)
    queries = Queries.from_histories([codes])
    for item, found in zip(best, engine.explain_all(history, best, n=5), strict=True):
        expected = why(engine.model, queries, 0, engine.items.code(item), most=5)
        assert {each.item for each in found} == {str(engine.items.id(each.item)) for each in expected}
        np.testing.assert_allclose([e.drop for e in found], [e.drop for e in expected], rtol=1e-3, atol=1e-4)
    one = engine.explain(history, best[0], None, 2)
    assert one == engine.explain_all(history, best, n=2)[0]
    evidence = engine.evidence(history, best[0])
    if evidence is not None:
        assert {each["item"] for each in evidence["weights"]} <= set(history)
        json.dumps(evidence)


def test_card_is_plain_json(engine: Engine) -> None:
    card = json.loads(json.dumps(engine.card()))
    assert card["model"]["method"] == engine.model.card.slug
    assert card["data"]["fingerprint"] == engine.log.fingerprint
    assert card["index"] == {"kind": "exact", "recall": 1.0}
    assert card["limits"]


def test_unknown_items_are_dropped_and_named(sasrec: Engine) -> None:
    answer, plain = sasrec.recommend(
        [Question(history=["i3", "nope", "i9", "nope", "'; --"]), Question(history=["i3", "i9"])]
    )
    assert answer.unknown == ["nope", "'; --"]  # type: ignore[attr-defined]
    assert plain.unknown == []  # type: ignore[attr-defined]
    assert [each.item for each in answer] == [each.item for each in plain]
    only = sasrec.recommend([Question(history=["nope"])])[0]
    assert only.fallback and all(each.fallback for each in only)  # type: ignore[attr-defined]
    assert list(sasrec.codes(["i3", "nope"])) == [sasrec.items.code("i3"), -1]


@pytest.mark.parametrize("odd", ["", " i3", "i3 ", "\x00", "\ud800", "i" * 10_000, "İ3", "i\n3", "-1", "3"])
def test_odd_ids_are_unknown(odd: str, sasrec: Engine) -> None:
    answer, plain = sasrec.recommend([Question(odd, [odd, "i3"], exclude=[odd]), Question(history=["i3"])])
    assert answer.unknown == [odd] and answer == plain  # type: ignore[attr-defined]
    assert not sasrec.knows_user(odd) and sasrec.history(odd) == [] and list(sasrec.codes([odd])) == [-1]


def test_an_unknown_user_goes_by_the_history(sasrec: Engine) -> None:
    stranger, nobody = sasrec.recommend([Question("nobody", ["i3", "i9"]), Question(None, ["i3", "i9"])])
    assert stranger == nobody
    assert not sasrec.knows_user("nobody") and sasrec.knows_user("u1")
    assert sasrec.history("nobody") == []


def test_questions_of_different_kinds_share_a_batch(sasrec: Engine) -> None:
    allowed = sasrec.mask([filter_of("brand", equals="b2")])
    questions = [
        Question("u1", sasrec.history("u1"), 3),
        Question(None, ["i3"], 7, allowed=allowed),
        Question(None, [], 2),
        Question(None, ["i3", "i4"], 5, exclude=["i5", "nope"], repeat=True),
    ]
    together = sasrec.recommend(questions)
    assert [len(each) for each in together] == [3, 7, 2, 5]
    for question, answer in zip(questions, together, strict=True):
        alone = sasrec.recommend([question])[0]
        assert [each.item for each in alone] == [each.item for each in answer]
    assert {sasrec.item(each.item)["attributes"]["brand"] for each in together[1]} == {"b2"}
    assert sasrec.recommend([]) == []


def test_a_bad_question_says_what_is_wrong(sasrec: Engine) -> None:
    with pytest.raises(ConfigError, match="k is 0"):
        sasrec.recommend([Question(history=["i3"], k=0)])
    with pytest.raises(ConfigError, match="one bool for each"):
        sasrec.recommend([Question(history=["i3"], allowed=np.ones(3, bool))])
    with pytest.raises(UnknownIdError, match="no scenario 'home'"):
        sasrec.recommend([Question(history=["i3"], scenario="home")])
    with pytest.raises(UnknownIdError, match="no item 'nope'"):
        sasrec.similar("nope", 3)
    with pytest.raises(UnknownIdError, match="no item 'nope'"):
        sasrec.explain(["i3"], "nope")
    with pytest.raises(ConfigError, match="no index 'fast'"):
        Engine.open(sasrec.run.path, index="fast")  # type: ignore[arg-type]


def test_nothing_is_left_to_recommend(sasrec: Engine) -> None:
    answer = sasrec.recommend([Question(history=["i3"], k=1_000)])[0]
    assert len(answer) == sasrec.n_items - 1
    closed = sasrec.recommend([Question(history=["i3"], allowed=np.zeros(sasrec.n_items, bool))])[0]
    assert closed == []


def numbers(engine: Engine, mask: np.ndarray[Any, Any]) -> set[int]:
    return {int(str(item)[1:]) for item in engine.items.ids(np.flatnonzero(mask))}


def test_filters(sasrec: Engine) -> None:
    def which(*filters: Any) -> set[int]:
        return numbers(sasrec, sasrec.mask(filters))

    everything = set(range(40))
    assert which() == everything
    assert which(filter_of("brand", equals="b2")) == {n for n in everything if n % 5 == 2}
    assert which(filter_of("brand", among=["b2", "b0", "zz"])) == {n for n in everything if n % 5 in (0, 2)}
    assert which(filter_of("tags", equals="odd")) == {n for n in everything if n % 2}
    assert which(filter_of("tags", among=["odd", "big"])) == {n for n in everything if n % 2 or n >= 20}
    priced = {n for n in everything if n % 7}
    assert which(filter_of("price", low=10)) == {n for n in priced if n >= 10}
    assert which(filter_of("price", low=10, high=20)) == {n for n in priced if 10 <= n <= 20}
    assert which(filter_of("price", equals=11)) == {11}
    assert which(filter_of("price", equals="11")) == set()
    both = (filter_of("price", high=20), filter_of("brand", equals="b1"))
    assert which(*both) == {n for n in priced if n <= 20 and n % 5 == 1}
    with pytest.raises(UnknownIdError, match="no attribute 'colour'"):
        which(filter_of("colour", equals="red"))
    with pytest.raises(ConfigError, match="no number"):
        which(filter_of("brand", low=3))
    assert not sasrec.mask(both[:1]).flags.writeable


def test_items_are_described(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "3.png").write_bytes(b"x")
    (tmp_path / "outside.png").write_bytes(b"x")
    engine = Engine.open(small_run(tmp_path / "run", "popularity", small_data(tmp_path / "pictures")))
    three = engine.item("i3")
    assert three["title"] == "Item <b>3</b>" and "title" not in three["attributes"]
    assert three["attributes"]["price"] == 3.0 and three["attributes"]["tags"] == ["odd", "small"]
    assert three["picture"] == str((tmp_path / "pictures" / "3.png").resolve())
    assert engine.item("i5")["picture"] is None  # no such file
    assert engine.item("i4")["picture"] is None  # outside the folder
    assert "price" not in engine.item("i7")["attributes"]
    with pytest.raises(UnknownIdError, match="no item 'nope'"):
        engine.item("nope")


def test_several_threads_get_their_own_answers(sasrec: Engine) -> None:
    questions = [Question(f"u{u}", sasrec.history(f"u{u}"), 5) for u in range(24)]
    expected = [[each.item for each in sasrec.recommend([question])[0]] for question in questions]
    wrong: list[int] = []

    def ask(at: int) -> None:
        for _ in range(10):
            if [each.item for each in sasrec.recommend([questions[at]])[0]] != expected[at]:
                wrong.append(at)

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def maps_of(tensor: torch.Tensor) -> str:
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(bound, 16) for bound in line.split(" ", 1)[0].split("-"))
        if low <= address < high:
            return line
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not say what is mapped")
def test_what_is_large_is_a_read_only_map(engine: Engine) -> None:
    """Item vectors, the networks' weights, and the log: files that processes share, which nothing can write to."""
    vectors = engine.scoring.vectors
    if vectors is not None:
        line = maps_of(vectors)
        assert " r--" in line and str(engine.run.path.name) in line
    for value in vars(engine.model).values():
        if isinstance(value, torch.nn.Module):
            for parameter in value.parameters():
                assert " r--" in maps_of(parameter) and "weights.safetensors" in maps_of(parameter)
    for array in (engine.log.item, engine.log.offsets):
        assert isinstance(array, np.memmap) and not array.flags.writeable


def test_products_stand_in_for_scores_only_where_they_agree(sasrec: Engine, folder: Path) -> None:
    assert sasrec.scoring.vectors is not None
    assert Engine.open(small_run(folder / "popular", "popularity")).scoring.vectors is None


def test_without_maps_it_answers_alike(sasrec: Engine) -> None:
    plain = Engine.open(sasrec.run.path, mmap=False)
    question = Question(history=["i3", "i9"])
    assert plain.fingerprint == sasrec.fingerprint
    assert [e.item for e in plain.recommend([question])[0]] == [e.item for e in sasrec.recommend([question])[0]]


@pytest.mark.parametrize(
    "harm",
    ["no run", "begun", "weights cut", "weights gone", "weights garbled", "header garbled", "model header odd", "newer",
     "data gone", "log cut", "data changed", "unknown method", "other items", "popularity cut"],
)  # fmt: skip
def test_a_damaged_or_unfinished_run_is_refused(harm: str, sasrec: Engine, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(sasrec.run.path, run)
    weights = run / "model" / "weights.safetensors"
    if harm == "no run":
        shutil.rmtree(run)
    elif harm == "begun":
        (run / "run.json").unlink()
    elif harm == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "weights gone":
        weights.unlink()
    elif harm == "weights garbled":
        weights.write_bytes(b"\xff" * 200)
    elif harm == "header garbled":
        (run / "run.json").write_text('{"format": 1}')
    elif harm == "model header odd":
        (run / "model" / "recommender.json").write_text("[]")
    elif harm == "newer":
        header = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**header, "format": 99}))
    elif harm == "data gone":
        shutil.rmtree(run / "data")
    elif harm == "log cut":
        item = run / "data" / "log" / "item.npy"
        item.write_bytes(item.read_bytes()[:-50])
    elif harm == "data changed":
        log = run / "data" / "log" / "log.json"
        header = json.loads(log.read_text())
        header["notes"]["fingerprint"] = "0" * 16
        log.write_text(json.dumps(header))
    elif harm == "unknown method":
        header = json.loads((run / "model" / "recommender.json").read_text())
        (run / "model" / "recommender.json").write_text(json.dumps({**header, "method": "gone"}))
    elif harm == "other items":
        for file in (run / "model" / "items").glob("*.npy"):
            file.unlink()
        np.save(run / "model" / "items" / "numbers.npy", np.arange(40))
    elif harm == "popularity cut":
        (run / "model" / "popularity.npy").write_bytes(b"")
    with pytest.raises(VouchError):
        Engine.open(run)


def test_a_model_that_ranks_otherwise_than_its_vectors_is_asked_itself(sasrec: Engine, monkeypatch: Any) -> None:
    cls = type(sasrec.model)
    monkeypatch.setattr(cls, "score", lambda self, queries: -(self.query_vectors(queries) @ self.item_vectors().T))
    other = Engine.open(sasrec.run.path)
    assert other.scoring.vectors is None
    ranking = other.model.recommend([Query(history=["i3", "i9"])], 5)
    assert [e.item for e in other.recommend([Question(history=["i3", "i9"], k=5)])[0]] == other.items.ids(
        ranking.item[0]
    )


def test_a_score_that_is_no_number_is_not_served(sasrec: Engine, monkeypatch: Any) -> None:
    other = Engine.open(sasrec.run.path)
    monkeypatch.setattr(other.model, "query_vectors", lambda queries: torch.full((len(queries), 16), torch.nan))
    with pytest.raises(VouchError, match="not a number"):
        other.recommend([Question(history=["i3"])])


def test_an_error_of_a_run_tells_where(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is no run"):
        Engine.open(tmp_path / "nothing")


def test_the_card_has_intervals_and_groups_once_measured(tmp_path: Path) -> None:
    engine = Engine.open(small_run(tmp_path / "run", "itemknn"))
    assert engine.card()["metrics"]["test"] is None
    assert engine.card()["metrics"]["validation"] == {"NDCG@10": 0.1}
    found = measure(engine.run, engine.fingerprint, most=20)
    assert engine.card()["metrics"]["test"] == json.loads(json.dumps(found))
    assert found["cases"] == 20 and found["of"] == 60
    for metric in found["metrics"].values():
        assert metric["low"] <= metric["value"] <= metric["high"]
    made = engine.run.split()
    whole = evaluate(engine.model, made.test, metrics=["HR@10"], train=made.train).metrics["HR@10"]
    assert found["metrics"]["HR@10"]["low"] - 0.2 <= whole <= found["metrics"]["HR@10"]["high"] + 0.2
    groups = found["groups"]["popularity of the target"]
    assert sum(group["cases"] for group in groups) == 20
    again = Engine.open(engine.run.path)
    assert again.card()["metrics"]["test"] == engine.card()["metrics"]["test"]  # kept, not measured again


def test_the_card_tells_the_claims_of_the_ledger(tmp_path: Path) -> None:
    claims = Engine.open(small_run(tmp_path / "run", "actsr")).card()["claims"]
    assert all(claim["verdict"] in ("holds", "does not hold", "inconclusive") for claim in claims)
    assert any(entry.slug == "actsr" for entry in read_ledger()) == bool(claims)


@pytest.mark.parametrize(
    ("slug", "kind"),
    [("sasrec", "attention"), ("comirec-sa", "routing"), ("nais", "attention"), ("ease", "similarity")],
)
def test_the_methods_own_evidence(slug: str, kind: str, folder: Path) -> None:
    engine = _engines.get(slug) or Engine.open(small_run(folder / f"evidence-{slug}", slug))
    history = ["i3", "i9", "i11"]
    found = engine.evidence(history, "i5")
    assert found is not None and found["kind"] == kind
    weights = {each["item"]: each["weight"] for each in found["weights"]}
    assert set(weights) <= set(history)
    if (kind == "attention" and slug == "sasrec") or kind == "routing":
        assert sum(weights.values()) == pytest.approx(1.0, abs=1e-4)  # a share of the whole
    if kind == "similarity":
        row = engine.model.similarities(engine.codes(["i9"]))[0]  # type: ignore[index]
        assert weights.get("i9", 0.0) == pytest.approx(float(row[engine.items.code("i5")]), abs=1e-6)
    assert engine.evidence([], "i5") is None
    assert Engine.open(small_run(folder / f"popular-{slug}", "popularity")).evidence(history, "i5") is None
