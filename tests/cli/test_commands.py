"""Commands that succeed: what they print for people, and their JSON, which is stable."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from vouch.cli.main import app

COMMANDS = {
    "demo": [], "data": ["prepare", "inspect"], "train": [], "evaluate": [], "recommend": [], "compare": [],
    "distil": [], "merge": [], "export": [], "score": [], "serve": [], "keys": ["add", "list", "remove"],
    "systems": [], "claims": ["list", "run", "show"],
}  # fmt: skip
LEAVES = [[name, *sub] for name, inner in COMMANDS.items() for sub in ([[word] for word in inner] or [[]])]


def test_the_commands_are_those_documented():
    group = typer.main.get_command(app)
    assert set(group.commands) == set(COMMANDS)
    assert all(set(getattr(group.commands[name], "commands", {})) == set(inner) for name, inner in COMMANDS.items())


@pytest.mark.parametrize("words", LEAVES, ids=" ".join)
def test_help_shows_an_example_that_parses(vouch, words):
    said = vouch(*words, "--help")
    assert said.code == 0
    (example,) = [line for line in said.out.splitlines() if "Example: vouch " in line]
    command = typer.main.get_command(app)
    arguments = shlex.split(example.split("Example: vouch ")[1])
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    command.make_context("vouch", arguments)  # an example that names an unknown option would raise here


def test_help_is_immediate_and_imports_no_library():
    code = (
        "import sys; from vouch.cli.main import main; main(['--help']); "
        "heavy = {'torch', 'polars', 'numpy', 'scipy', 'matplotlib', 'optuna'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 1.0  # 0.25 s on an idle machine; the tests share theirs


def test_version(vouch):
    import vouch as library

    assert vouch("--version").out.strip() == library.__version__


def test_train_evaluate_recommend(vouch, markov_run):
    header = json.loads((markov_run / "run.json").read_text())
    assert header["method"] == "markov" and header["format"] == 1 and header["split"]["protocol"] == "leave-one-out"
    found = vouch("evaluate", markov_run, "--json").json
    # Every user's next step is the next on the ring, and every such pair was seen in training.
    assert found["metrics"]["NDCG@10"] == pytest.approx(1.0) and found["metrics"]["HR@10"] == 1.0
    assert found["intervals"]["NDCG@10"] == pytest.approx([1.0, 1.0])
    assert (found["method"], found["part"]) == ("markov", "test")
    text = vouch("evaluate", markov_run, "--metrics", "MRR", "--part", "valid")
    assert text.code == 0 and "MRR" in text.out and "1.0000" in text.out


def test_recommend_to_a_user_and_to_a_bare_history(vouch, markov_run):
    known = vouch("recommend", markov_run, "--user", "u3", "-k", "3", "--json").json
    assert known["user"] == "u3" and known["fallback"] is False and len(known["recommendations"]) == 3
    assert known["history"][0] == {"item": "sku-8", "title": "Thing 8"}
    bare = vouch("recommend", markov_run, "--history", "sku-1,sku-2", "-k", "2", "--json").json
    first = bare["recommendations"][0]
    assert (first["item"], first["title"]) == ("sku-3", "Thing 3")
    assert first["because"][0]["item"] == "sku-2"  # the step before it, not the one before that
    shown = vouch("recommend", markov_run, "--history", '"sku-1", sku-2')
    assert shown.code == 0 and "Thing 3" in shown.out and "Thing 2" in shown.out


def test_seen_items_come_back_only_when_asked(vouch, markov_run):
    history = "sku-3,sku-2"
    without = vouch("recommend", markov_run, "--history", history, "--json").json
    again = vouch("recommend", markov_run, "--history", history, "--repeat", "--json").json
    assert not {"sku-2", "sku-3"} & {row["item"] for row in without["recommendations"]}
    assert again["recommendations"][0]["item"] == "sku-3"


def test_an_empty_history_gets_the_popular_items_and_is_told(vouch, markov_run):
    said = vouch("recommend", markov_run, "--history", "", "--json")
    assert said.code == 0 and said.json["fallback"] is True and said.json["recommendations"]


def test_data_prepare_and_inspect(vouch, log_csv, tmp_path):
    made = vouch("data", "prepare", log_csv, "--out", tmp_path / "made", "--json").json
    assert (made["rows"], made["users"], made["items"]) == (120, 20, 12)
    assert isinstance(vouch("data", "inspect", tmp_path / "made", "--json").json, dict)
    # A run from prepared data refers to it and does not copy it.
    assert vouch("train", "popularity", "--data", tmp_path / "made", "--out", "run").code == 0
    assert not Path("run/data").exists() and vouch("evaluate", "run").code == 0


def test_columns_filters_and_settings_reach_the_library(vouch, log_csv, tmp_path):
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(log_csv.read_text().replace("user,item,time", "uid,sku,ts"))
    words = ["train", "itemknn", "--data", renamed, "--columns", "user=uid,item=sku,time=ts", "--out", "run"]
    said = vouch(*words, "--split", "ratio", "--set", "neighbors=3", "--json")
    assert said.code == 0 and set(said.json) >= {"run", "method", "seconds", "validation"}
    header = json.loads(Path("run/run.json").read_text())
    assert header["split"]["protocol"] == "ratio" and header["config"]["neighbors"] == 3


def test_settings_of_a_method_are_shown(vouch):
    said = vouch("systems", "sasrec", "--json").json
    names = {row["name"]: row for row in said["settings"]}
    assert said["slug"] == "sasrec" and names["epochs"]["description"] and "hidden_size" in names
    assert "hidden_size" in vouch("systems", "sasrec").out


def test_compare_json_has_a_row_a_method(vouch, log_csv):
    words = ["compare", "--data", log_csv, "--methods", "popularity,markov", "--seeds", "2", "--trials", "2"]
    said = vouch(*words, "--jobs", "1", "--out", "c", "--json")
    assert said.code == 0, said.err
    rows = said.json["methods"]
    assert {row["method"] for row in rows} == {"popularity", "markov"}
    assert all({"metrics", "intervals", "cost"} <= set(row) for row in rows)
    assert Path("c/report.html").exists()
    again = vouch(*words, "--jobs", "1", "--out", "c", "--json")
    assert [row["metrics"] for row in again.json["methods"]] == [row["metrics"] for row in rows]
