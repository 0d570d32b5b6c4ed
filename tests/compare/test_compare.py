"""A whole comparison in small: budgets, resume, failure, the report and the JSON."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from vouch import Dataset, Interactions
from vouch.compare import compare, write_report
from vouch.compare.report import Person, Shown
from vouch.compare.units import Plan, base_config, tune
from vouch.data import Catalog
from vouch.errors import ConfigError, DataError, UnknownIdError

HOSTILE = '<script>alert(1)</script> & "more"'


def made_data(seed: int = 0) -> Dataset:
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(80), 8)
    item = np.concatenate([random.choice(15, 8, replace=False) + 15 * (u % 2) for u in range(80)])
    log = Interactions.from_arrays(user, item, time=np.tile(np.arange(8), 80) + 1000 * user)
    frame = pl.DataFrame({"item": np.arange(30), "title": [HOSTILE] * 30})
    return Dataset(log, Catalog.from_frame(log.items, frame, id_column="item"), None, HOSTILE)


METHODS = ["popularity", "itemknn", "bpr"]
SETTINGS = {"bpr": ["epochs=4", "hidden_size=8", "evaluate_every=2"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def first(folder: Path) -> Any:
    return compare(
        made_data(), METHODS, out=folder, seeds=2, trials=2, settings=SETTINGS, jobs=1, command="vouch compare X"
    )


def test_every_method_has_its_row_and_its_budget(first: Any, folder: Path) -> None:
    rows = {row["method"]: row for row in first.to_dict()["methods"]}
    assert set(rows) == set(METHODS)
    assert [rows[slug]["seeds"] for slug in METHODS] == [1, 1, 2]
    assert [rows[slug]["trials"] for slug in METHODS] == [1, 2, 2]  # popularity has nothing to tune
    for row in rows.values():
        assert row["status"] == "ok"
        low, high = row["intervals"]["NDCG@10"]
        assert low <= row["metrics"]["NDCG@10"] <= high
        assert row["cost"]["fit_seconds"] > 0 and row["cost"]["latency_p99_ms"] >= row["cost"]["latency_p50_ms"] > 0
    assert rows["bpr"]["config"]["epochs"] == 4
    assert rows["bpr"]["metrics"]["NDCG@10"] == pytest.approx(np.mean([s["NDCG@10"] for s in rows["bpr"]["per_seed"]]))
    means = [row["metrics"]["NDCG@10"] for row in first.rows]
    assert means == sorted(means, reverse=True)
    assert json.loads((folder / "comparison.json").read_text()) == json.loads(json.dumps(first.to_dict()))


def test_the_schema_is_stable(first: Any) -> None:
    found = first.to_dict()
    assert set(found) == {
        "format", "headline", "verdict", "methods", "split", "warnings", "plan", "machine", "command",
    }  # fmt: skip
    row = "method name status metrics intervals cost config trials seeds per_seed against_best"
    assert set(row.split()) <= set(found["methods"][0])


def test_starting_again_does_nothing_twice_and_gives_the_same(
    first: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "units").iterdir()}
    again = compare(
        made_data(), METHODS, out=folder, seeds=2, trials=2, settings=SETTINGS, jobs=1, command="vouch compare X"
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "units").iterdir()} == before
    a, b = first.to_dict(), again.to_dict()
    assert a["methods"] == b["methods"] and a["verdict"] == b["verdict"]


def test_more_seeds_reuse_the_finished_ones(first: Any, folder: Path) -> None:
    before = {path.name for path in (folder / "units").iterdir()}
    compare(made_data(), METHODS, out=folder, seeds=3, trials=2, settings=SETTINGS, jobs=1)
    new = {path.name for path in (folder / "units").iterdir()} - before
    assert sorted(name.split(".")[1] for name in new) == ["json", "npz"]


def test_other_data_in_the_same_folder_is_refused(first: Any, folder: Path) -> None:
    with pytest.raises(DataError, match="other data"):
        compare(made_data(seed=5), METHODS, out=folder, seeds=2, trials=2, jobs=1)


def test_a_failing_method_does_not_take_the_others_along(tmp_path: Path) -> None:
    found = compare(
        made_data(), ["popularity", "ease"], out=tmp_path, seeds=1, trials=1, settings={"ease": ["max_items=5"]}, jobs=1
    )
    rows = {row["method"]: row for row in found.rows}
    assert rows["popularity"]["status"] == "ok" and rows["ease"]["status"] == "failed"
    assert "dense" in rows["ease"]["error"]
    with pytest.raises(DataError, match="every method failed"):
        compare(
            made_data(), ["ease"], out=tmp_path / "b", seeds=1, trials=1, settings={"ease": ["max_items=5"]}, jobs=1
        )


def test_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnknownIdError, match="no method 'sasrek'"):
        compare(made_data(), ["sasrek"], out=tmp_path / "a")
    with pytest.raises(ConfigError, match="no setting 'epoch'"):
        compare(made_data(), ["bpr"], out=tmp_path / "a", settings={"bpr": ["epoch=3"]})
    with pytest.raises(ConfigError, match="no metric"):
        compare(made_data(), ["bpr"], out=tmp_path / "a", metrics=["NDGC@10"])
    with pytest.raises(ConfigError, match="decides"):
        compare(made_data(), ["bpr"], out=tmp_path / "a", metrics=["Coverage@10"])
    with pytest.raises(ConfigError, match="no method to compare"):
        compare(made_data(), [], out=tmp_path / "a")
    assert not (tmp_path / "a" / "units").exists()


def test_tuning_never_looks_at_test_and_begins_with_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_data().save(tmp_path / "data")
    plan = Plan(data=str(tmp_path / "data"), fingerprint="x", methods=("itemknn",), trials=3)
    seen = []
    import vouch.evaluation as evaluation

    real = evaluation.evaluate

    def watched(model: Any, cases: Any, **options: Any) -> Any:
        seen.append(cases)
        return real(model, cases, **options)

    monkeypatch.setattr(evaluation, "evaluate", watched)
    units = tmp_path / "units"
    units.mkdir()
    best = tune(plan, "itemknn", units)
    valid = plan.open().valid
    assert len(seen) == 3
    assert all((cases.stop == valid.stop).all() for cases in seen)
    trials = [json.loads(path.read_text()) for path in sorted(units.glob("*trial*.json"))]
    assert trials[0]["config"] == base_config(plan, "itemknn").model_dump(mode="json")
    assert best["value"] == max(trial["value"] for trial in trials)
    assert len({json.dumps(trial["config"]) for trial in trials}) == 3


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_needs_nothing_else_and_shows_hostile_text_as_text(first: Any, tmp_path: Path) -> None:
    person = Person(HOSTILE, [Shown(HOSTILE)], [Shown(HOSTILE, HOSTILE, "data:image/png;base64,AAAA", HOSTILE)])
    page = write_report(first, tmp_path / "report.html", people=[person]).read_text()
    reader = _Reader()
    reader.feed(page)
    assert "script" not in reader.tags and "link" not in reader.tags
    assert all(link.startswith(("data:", "#")) for link in reader.links), reader.links
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    assert reader.tags.count("svg") == 4
    assert HOSTILE in reader.text and first.verdict.sentence in reader.text
    assert "vouch compare X" in reader.text


def test_with_one_trial_nothing_is_trained_to_choose_settings(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    found = compare(made_data(), ["popularity", "itemknn"], out=folder, seeds=1, trials=1, settings=SETTINGS, jobs=1)
    assert not list((folder / "units").glob("*trial*"))
    for row in found.rows:
        assert row["trials"] == 1 and row["validation"] == {} and row["cost"]["tuning_seconds"] == 0
        assert row["config"] == base_config(found.plan, row["method"]).model_dump(mode="json")


def test_it_is_told_whose_training_was_cut_short(tmp_path: Path) -> None:
    """By the clock, or by its epochs while it still got better; not whoever's patience ended."""

    def ran(methods: list[str], max_seconds: float | None = None, **settings: list[str]) -> tuple[Any, list[str]]:
        out = tmp_path / "-".join(methods)
        found = compare(
            made_data(), methods, out=out, seeds=1, trials=1, settings=settings, max_seconds=max_seconds, jobs=1
        ).to_dict()
        rows = {row["method"]: row["stopped"] for row in found["methods"]}
        return rows, [text for text in found["warnings"] if "may change what is said of them" in text]

    rows, warnings = ran(["popularity", "bpr"], 0.5, bpr=["epochs=1000000", "patience=1000000", "hidden_size=8"])
    assert rows == {"popularity": ["closed form"], "bpr": ["time"]}
    assert warnings == ["the clock stopped BPR-MF: more seconds may change what is said of them"]
    rows, warnings = ran(["sasrec"], sasrec=["epochs=1", "hidden_size=8"])
    assert rows == {"sasrec": ["epochs"]} and warnings[0].startswith("the last epoch was the best one of SASRec:")
    assert ran(["bpr"], bpr=["epochs=1000", "hidden_size=8", "patience=1"]) == ({"bpr": ["patience"]}, [])
