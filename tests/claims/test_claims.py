"""Claims: verdicts and intervals on synthetic measurements, the ledger, the runner, and the list of systems."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vouch import systems
from vouch.claims import LedgerEntry, Measurement, claim, claims, read_ledger, run_claim
from vouch.claims.claim import SCALES, Claim
from vouch.claims.ledger import PACKAGED, append, newest
from vouch.claims.runner import effect_interval, verdict
from vouch.errors import ConfigError, StorageError, UnknownIdError, VouchError
from vouch.evaluation import Interval

ENTRY = LedgerEntry(
    slug="apr", variant="accuracy", scale="desk", seeds=[0, 1], metric="NDCG@100", baseline=0.1, method=0.2,
    effect=0.1, interval=[0.05, 0.15], verdict="holds", data="ml_100k", command="vouch claims run apr", commit="abc",
)  # fmt: skip


def seeds(*effects: float) -> list[Measurement]:
    return [Measurement(1.0, 1.0 + effect, effect) for effect in effects]


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.1, 0.2, "holds"),
        (-0.2, -0.1, "does not hold"),
        (-0.1, 0.2, "inconclusive"),
        (0.0, 0.2, "inconclusive"),  # touching 0 proves nothing
        (-0.2, 0.0, "inconclusive"),
        (float("-inf"), float("inf"), "inconclusive"),
    ],
)
def test_verdict(low, high, expected):
    assert verdict(Interval(0.0, low, high)) == expected


def test_apr_and_bpr_see_the_same_batches(monkeypatch):
    """With an adversary of weight 0 the pair is one model: same start, same batches, same number of steps."""
    from vouch.claims.apr import train_pair
    from vouch.data import split
    from vouch.data.readers import read

    monkeypatch.setitem(sys.modules["vouch.claims.apr"].BUDGET, "smoke", (1, 2))
    plain, hardened = train_pair(split(read("world")), "smoke", 0, adversarial_weight=0.0)
    for name, table in plain.factors.state_dict().items():
        np.testing.assert_array_equal(table.numpy(), hardened.factors.state_dict()[name].numpy())


def test_the_interval_over_seeds_is_students():
    effects = [0.01, 0.03, 0.02, 0.05, 0.04]
    found = effect_interval(seeds(*effects))
    low, high = stats.t.interval(0.95, 4, np.mean(effects), stats.sem(effects))
    assert (found.mean, found.low, found.high) == pytest.approx((0.03, low, high))
    assert verdict(found) == "holds"
    assert verdict(effect_interval(seeds(*(-effect for effect in effects)))) == "does not hold"
    assert verdict(effect_interval(seeds(0.1, -0.1, 0.05, -0.04, 0.02))) == "inconclusive"


def test_paired_cases_make_the_interval_that_of_the_differences():
    rng = np.random.default_rng(0)
    hardness = rng.normal(0, 10, 400)  # shared by both sides; unpaired it would drown the effect

    def pair(effect: float) -> Measurement:
        a = hardness + rng.normal(0, 0.1, 400)
        return Measurement(a.mean(), a.mean() + effect, effect, a, a + effect + rng.normal(0, 0.1, 400))

    found = effect_interval([pair(0.05) for _ in range(5)])
    assert found.low < 0.05 < found.high and found.high - found.low < 0.03
    assert verdict(found) == "holds"


def test_one_seed_without_cases_falls_back_to_seeds():
    cases = np.array([0.0, 1.0])
    mixed = [Measurement(0.5, 0.5, 0.0, cases, cases), Measurement(0.5, 0.7, 0.2)]
    assert effect_interval(mixed) == effect_interval(seeds(0.0, 0.2))


def test_verdicts_err_as_rarely_as_promised():
    rng = np.random.default_rng(1)
    wrong = sum(verdict(effect_interval(seeds(*rng.normal(0, 1, 5)))) != "inconclusive" for _ in range(400))
    assert stats.binomtest(wrong, 400, 0.05).pvalue > 0.001


def test_the_ledger_gives_back_what_was_appended(tmp_path):
    path = tmp_path / "new" / "ledger.jsonl"
    second = dataclasses.replace(
        ENTRY, variant="robustness", effect=-1.0, interval=[-2.0, -0.5], verdict="does not hold"
    )
    append(ENTRY, path)
    first_line = path.read_bytes()
    append(second, path)
    assert read_ledger(path) == [ENTRY, second]
    assert path.read_bytes().startswith(first_line)  # nothing that was written changes


def test_it_is_told_where_the_epochs_ran_out(tmp_path, capsys, monkeypatch):
    from vouch.cli.main import main

    ends = [("finished", "patience"), ("finished", "patience")]
    rows = [{"seed": seed, "baseline_stopped": a, "method_stopped": b} for seed, (a, b) in enumerate(ends)]
    entry = dataclasses.replace(ENTRY, baseline_name="SASRec", method_name="Other", per_seed=rows)
    assert (entry.cut_short("baseline"), entry.cut_short("method"), ENTRY.cut_short("method")) == (2, 0, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vouch.claims.read_ledger", lambda path=None: [entry])
    assert main(["claims", "show", "apr"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the epochs ran out before the patience did: SASRec in 2 of 2 seeds;" in said and "Other in" not in said


def test_the_newest_run_of_each_claim_is_listed(tmp_path, capsys):
    from vouch.cli.main import main

    path = tmp_path / "l.jsonl"
    later = dataclasses.replace(ENTRY, interval=[-0.1, 0.3], verdict="inconclusive", commit="later")
    elsewhere = dataclasses.replace(ENTRY, data="mine", commit="mine")
    for entry in (ENTRY, elsewhere, later):
        append(entry, path)
    assert newest(read_ledger(path)) == [later, elsewhere]

    def listed(*words):
        assert main(["claims", "list", "apr", "--ledger", str(path), *words]) == 0
        return capsys.readouterr().out

    assert [each["commit"] for each in json.loads(listed("--json"))] == ["later", "mine"]
    assert [each["commit"] for each in json.loads(listed("--json", "--all"))] == ["abc", "mine", "later"]
    assert "1 earlier runs" in listed() and "earlier" not in listed("--all")
    assert main(["claims", "show", "apr", "--ledger", str(path)]) == 0
    assert capsys.readouterr().out.count("superseded by a later run") == 1


GOOD = json.dumps(ENTRY.to_dict())


@pytest.mark.parametrize(
    "line",
    [
        GOOD[:-20],
        "[]",
        "3",
        json.dumps({"slug": "apr"}),
        GOOD.replace('"holds"', '"splendid"'),
        GOOD.replace('"holds"', '"inconclusive"'),  # the interval says otherwise
        GOOD.replace("[0.05, 0.15]", "[0.15, 0.05]"),
        GOOD.replace("[0.05, 0.15]", "[0.05]"),
        GOOD.replace('"slug"', '"snail"'),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(StorageError, match=r"ledger\.jsonl, line 3"):
        read_ledger(path)


def test_a_ledger_that_is_missing_or_cannot_be_written(tmp_path):
    with pytest.raises(StorageError, match="no ledger"):
        read_ledger(tmp_path / "none.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StorageError, match="cannot write the ledger"):
        append(ENTRY, tmp_path / "folder.jsonl")


def test_the_shipped_ledger_is_sound():
    known = {(found.slug, found.variant): found for found in claims()}
    for entry in read_ledger(PACKAGED):
        found = known[entry.slug, entry.variant]
        assert entry.statement == found.statement and entry.metric == found.metric
        assert entry.scale == "smoke" or len(entry.seeds) >= 5
        assert entry.commit and entry.date and entry.machine and entry.fingerprint
        assert entry.effect == pytest.approx(np.mean([row["effect"] for row in entry.per_seed]))
        assert len(entry.per_seed) == len(entry.seeds)
        assert not re.search(r"(^|\s)/\w", entry.command)  # reproducible elsewhere


def test_every_claim_is_complete():
    assert {found.slug for found in claims()} >= {"sasrec", "apr"}
    assert claims("sasrec")[0].variant == "loss"
    assert {found.variant for found in claims("apr")} == {"robustness", "direction", "accuracy", "control"}
    for found in claims():
        assert all(getattr(found, name) for name in ("statement", "metric", "effect", "baseline", "method", "reported"))
        assert set(found.data) == set(SCALES)
        assert re.match("world$|drawn|generated$", found.data["smoke"]), "smoke needs no files"


def test_unknown_claims_are_refused():
    with pytest.raises(UnknownIdError, match="'victor'"):
        claim("victor")
    with pytest.raises(UnknownIdError, match="did you mean 'accuracy'"):
        claim("apr", "acuracy")
    with pytest.raises(ConfigError, match="no scale 'lunch'"):
        run_claim("apr", "lunch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no interval"):
        run_claim("apr", seeds=1)


class Counting(Claim):
    """A claim without training, which counts how often it is measured."""

    slug, variant = "counting", "main"
    statement, metric, baseline, method, reported = "more is more", "rows", "none", "all", "paper: yes"
    data = {"smoke": "world"}
    calls: list[int] = []

    def measure(self, dataset, scale, seed):
        self.calls.append(seed)
        if seed == 3:
            raise ConfigError("seed 3 fails")
        return Measurement(0.0, 1.0 + seed, 1.0 + seed, np.zeros(4), np.full(4, 1.0 + seed), details={"rows": 9})


def in_this_process(workers):
    """A thread in place of processes, which would not know the counting claim."""
    return ThreadPoolExecutor(1)


@pytest.fixture
def counting(monkeypatch, tmp_path):
    """The counting claim, registered for one test, measured in this process."""
    import vouch.claims.runner as runner

    claims()
    monkeypatch.setitem(sys.modules["vouch.claims.claim"]._claims, ("counting", "main"), Counting())
    monkeypatch.setattr(runner, "processes", in_this_process)
    monkeypatch.setattr(Counting, "calls", [])
    (tmp_path / "log.csv").write_text("user,item,time\na,x,1\na,y,2\nb,x,3\nb,y,4\n")
    return {"data": str(tmp_path / "log.csv"), "out": tmp_path / "out", "ledger": tmp_path / "ledger.jsonl", "jobs": 1}


def test_an_entry_holds_all_that_is_needed_to_run_it_again(counting):
    entry = run_claim("counting", seeds=3, command="vouch claims run counting", **counting)
    assert entry.seeds == [0, 1, 2] and entry.effect == pytest.approx(2.0) and entry.method == pytest.approx(2.0)
    assert entry.interval[0] < 2 < entry.interval[1]
    assert entry.data == "log" and entry.fingerprint and entry.command and entry.machine
    assert entry.verdict == verdict(Interval(entry.effect, *entry.interval))
    assert [row["rows"] for row in entry.per_seed] == [9, 9, 9]
    assert read_ledger(counting["ledger"]) == [entry]


def test_a_stopped_run_goes_on_with_the_seeds_that_are_missing(counting):
    with pytest.raises(ConfigError, match="seed 3"):
        run_claim("counting", seeds=4, **counting)
    assert not counting["ledger"].exists()  # nothing is said before all seeds are in
    measured = list(Counting.calls)
    entry = run_claim("counting", seeds=3, **counting)
    assert sorted(measured) == [0, 1, 2, 3] and Counting.calls == measured  # none was measured again
    assert entry.seeds == [0, 1, 2]


def test_other_data_is_measured_anew(counting):
    run_claim("counting", seeds=2, **counting)
    Path(counting["data"]).write_text("user,item,time\na,x,1\na,z,2\nb,x,3\nb,z,4\n")
    run_claim("counting", seeds=2, **counting)
    assert Counting.calls == [0, 1, 0, 1] and len(read_ledger(counting["ledger"])) == 2


def test_missing_public_data_is_told_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.delenv("VOUCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VouchError, match="VOUCH_DATA") as caught:
        run_claim("apr", "desk", out=tmp_path / "out", ledger=tmp_path / "l.jsonl")
    assert "ml_100k" in str(caught.value)


def test_smoke_runs_end_to_end_and_can_be_read_back(tmp_path):
    """A real claim, with training and with processes, through the command."""
    words = [sys.executable, "-m", "vouch.cli", "claims", "run", "apr", "--variant", "accuracy", "--scale", "smoke"]
    done = subprocess.run([*words, "--ledger", "l.jsonl", "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (entry,) = json.loads(done.stdout)
    documented = {"slug", "scale", "seeds", "metric", "baseline", "method", "effect", "interval", "verdict", "data"}
    assert documented | {"command", "commit"} <= set(entry)
    assert (entry["slug"], entry["scale"], entry["seeds"], entry["data"]) == ("apr", "smoke", [0, 1], "world")
    assert 0 < entry["baseline"] < 1 and entry["effect"] == pytest.approx(entry["method"] - entry["baseline"])
    assert entry["command"] == "vouch claims run apr --scale smoke --variant accuracy"
    assert [each.to_dict() for each in read_ledger(tmp_path / "l.jsonl")] == [entry]


def test_the_table_of_systems():
    assert len(systems.SYSTEMS) == 46 and len({system.slug for system in systems.SYSTEMS}) == 46
    for system in systems.SYSTEMS:
        assert re.fullmatch(r"[a-z0-9-]+", system.slug) and system.summary and system.name
        assert system.papers and all(re.fullmatch(r"\d{4}\.\d{5}", paper) for paper in system.papers)
    rows = {row["slug"]: row["status"] for row in systems.status_rows()}
    assert rows["apr"] == "works" and rows["victor"] == "not yet"  # change this when it does work
    assert {row["slug"] for row in systems.baseline_rows()} >= {
        "popularity",
        "itemknn",
        "markov",
        "ease",
        "bpr",
        "sasrec",
    }
    assert not {row["slug"] for row in systems.baseline_rows()} & set(rows)


def test_a_system_works_when_its_module_is_there(monkeypatch):
    for system in systems.SYSTEMS:
        if module := systems.module_of(system):
            assert claims(system.slug), f"{module} has no claim"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {row["status"] for row in systems.status_rows()} == {"not yet"}


def test_techniques_show_their_settings_too(capsys):
    from vouch.cli.main import main

    assert main(["systems", "surgery", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["module"] == "vouch.merging.surgery" and "rank" in {row["name"] for row in found["settings"]}
    assert main(["systems", "adatsk"]) == 2 and "'adatask'" in capsys.readouterr().err
    assert main(["systems", "victor"]) == 2 and "not built yet" in capsys.readouterr().err
