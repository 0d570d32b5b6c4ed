"""What a user can get wrong: one message on standard error, exit code 2, nothing on standard output, no traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vouch.cli import main as command
from vouch.cli.shared import emit


def refused(said, *words):
    assert said.code == 2, (said.out, said.err)
    assert said.out == "" and "Traceback" not in said.err
    assert said.err.count("error:") + said.err.count("Error:") == 1
    for word in words:
        assert word in said.err, said.err


def test_unknown_names_get_a_suggestion(vouch, log_csv):
    refused(vouch("trian"), "'trian'", "train")
    refused(vouch("claims", "rnu"), "run")
    assert vouch("trian").err.count("Did you mean") == 1
    refused(vouch("train", "sasrecc", "--data", log_csv, "--out", "r"), "'sasrecc'", "did you mean", "'sasrec'")
    refused(vouch("train", "sasrec", "--data", log_csv, "--out", "r", "--set", "epoch=3"), "'epoch'", "'epochs'")
    refused(vouch("compare", "--data", log_csv, "--out", "r", "--methods", "popularty"), "'popularity'")
    refused(vouch("compare", "--data", log_csv, "--out", "r", "--methods", "bpr", "--set", "epoch=3"), "epochs")
    refused(vouch("systems", "sasrecc"), "'sasrec'")
    assert not Path("r").exists()


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--set", "epochs=many"], ["epochs", "'many'", "most passes"]),
        (["--set", "epochs=0"], ["epochs"]),
        (["--set", "epochs"], ["key=value"]),
        (["--device", "tpu"], ["'tpu'", "cuda"]),
        (["--precision", "half"], ["'half'", "bf16"]),
        (["--split", "leave-two-out"], ["'leave-two-out'", "leave-one-out"]),
        (["--columns", "user"], ["'user'", "ROLE=NAME"]),
        (["--columns", "user=nobody"], ["nobody"]),
        (["--format", "excel"], ["'excel'"]),
        (["--seed", "-1"], ["--seed"]),
        (["--duplicates", "some"], ["some"]),
        (["--since", "yesterday"], ["yesterday"]),
        (["--colour", "red"], ["--colour"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_bad_option_is_refused_before_anything_is_written(vouch, log_csv, extra, words):
    refused(vouch("train", "sasrec", "--data", log_csv, "--out", "r", *extra), *words)
    assert not Path("r/run.json").exists()


def test_a_missing_argument(vouch):
    refused(vouch("train"), "METHOD")
    refused(vouch("train", "sasrec", "--out", "r"), "--data")


def test_data_that_is_missing_or_unusable(vouch, tmp_path):
    refused(vouch("train", "popularity", "--data", "nope.csv", "--out", "r"), "nope.csv")
    empty = tmp_path / "empty.csv"
    empty.write_text("")
    refused(vouch("data", "inspect", empty), "empty")
    broken = tmp_path / "broken.csv"
    broken.write_text("user,item,time\na,b,soon\n")
    refused(vouch("data", "inspect", broken), "soon")
    short = tmp_path / "short.csv"
    short.write_text("user,item,time\na,x,1\nb,y,2\n")
    refused(vouch("train", "popularity", "--data", short, "--out", "r"))
    assert not Path("r/run.json").exists()


def test_an_output_folder_that_cannot_be_written_is_found_before_training(vouch, log_csv, tmp_path, monkeypatch):
    from vouch.recommenders.sequential.sasrec import SASRec

    monkeypatch.setattr(SASRec, "fit", lambda *a, **k: pytest.fail("training began"))
    (tmp_path / "file").write_text("in the way")
    for words in (["train", "sasrec"], ["compare", "--methods", "sasrec"], ["data", "prepare"]):
        source = [log_csv] if words[0] == "data" else ["--data", log_csv]
        refused(vouch(*words, *source, "--out", tmp_path / "file" / "run"), "cannot write")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    refused(vouch("train", "sasrec", "--data", log_csv, "--out", tmp_path / "full"), "is no run")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"


def test_runs_that_cannot_be_opened(vouch, markov_run, tmp_path):
    refused(vouch("evaluate", "nothing"), "no run", "vouch train")
    run = tmp_path / "copy"
    shutil.copytree(markov_run, run)
    header = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**header, "format": 99, "version": "9.1"}))
    for name in ("evaluate", "recommend"):
        extra = ["--user", "u1"] if name == "recommend" else []
        refused(vouch(name, run, *extra), "format 99", "9.1", "upgrade")
    (run / "run.json").write_text(json.dumps(header)[:50])
    refused(vouch("evaluate", run), "run.json")
    (run / "run.json").write_text("{}")
    refused(vouch("evaluate", run), "damaged")


def test_data_changed_since_training(vouch, log_csv, tmp_path):
    vouch("data", "prepare", log_csv, "--out", "made")
    assert vouch("train", "popularity", "--data", "made", "--out", "run").code == 0
    other = tmp_path / "other.csv"
    other.write_text(log_csv.read_text().replace("u3,sku-5", "u3,sku-11"))
    vouch("data", "prepare", other, "--out", "made")
    refused(vouch("evaluate", "run"), "changed")
    shutil.rmtree("made")
    refused(vouch("evaluate", "run"))


def test_questions_a_run_cannot_answer(vouch, markov_run):
    refused(vouch("recommend", markov_run), "--user")
    refused(vouch("recommend", markov_run, "--user", "u99"), "'u99'")
    refused(vouch("recommend", markov_run, "--history", "sku-1,sku-99"), "'sku-99'", "sku-")
    refused(vouch("recommend", markov_run, "--user", "u1", "-k", "0"), "-k")
    refused(vouch("evaluate", markov_run, "--part", "train"), "'train'")
    refused(vouch("evaluate", markov_run, "--metrics", "NDGC@10"), "NDCG@10")


def test_a_full_disk_is_one_message(vouch, log_csv, monkeypatch):
    from vouch.recommenders.collaborative.popularity import Popularity

    def full(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Popularity, "save", full)
    refused(vouch("train", "popularity", "--data", log_csv, "--out", "r"), "No space left", "free some space")
    refused(vouch("evaluate", "r"), "not finished")


def test_too_little_memory_is_one_message(vouch, monkeypatch, markov_run):
    import vouch.recommenders.runs as runs

    def too_much(path):
        raise MemoryError

    monkeypatch.setattr(runs, "open_run", too_much)
    refused(vouch("evaluate", markov_run), "memory", "batch_size")


def test_an_error_of_ours_is_not_dressed_up(vouch, monkeypatch, markov_run):
    import vouch.recommenders.runs as runs

    def bug(path):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(runs, "open_run", bug)
    with pytest.raises(ZeroDivisionError):
        vouch("evaluate", markov_run)


def test_json_has_no_nan(capsys):
    emit({"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0]}


def test_a_reader_that_goes_away_is_no_error():
    script = f"{sys.executable} -m vouch.cli systems --json | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_an_interrupted_training_can_be_resumed(vouch, log_csv, tmp_path):
    out = tmp_path / "run"
    words = ["train", "gru4rec", "--data", str(log_csv), "--out", str(out), "--set", "hidden_size=8"]
    words += ["--set", "recurrent_size=8", "--set", "patience=100000"]
    # A shell may have told its children to ignore interrupts.
    script = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from vouch.cli.main import run; run()"
    command_line = [sys.executable, "-c", script, *words, "--set", "epochs=100000"]
    process = subprocess.Popen(command_line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    last = out / "checkpoints" / "last" / "checkpoint.json"
    deadline = time.monotonic() + 60
    while not last.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, message = process.communicate(timeout=60)
    assert process.returncode == 130 and printed == "" and "Traceback" not in message
    assert "--resume" in message and str(out) in message
    refused(vouch("evaluate", out), "not finished", "--resume")
    epochs = json.loads(last.read_text())["progress"]["epoch"]
    done = vouch(*words, "--set", f"epochs={epochs + 2}", "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["epochs"] == epochs + 2 and vouch("evaluate", out).code == 0


def test_an_interrupt_elsewhere_is_one_line(vouch, monkeypatch, markov_run):
    import vouch.recommenders.runs as runs

    def stop(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "open_run", stop)
    said = vouch("evaluate", markov_run)
    assert said.code == 130 and len(said.err.strip().splitlines()) == 1


def test_the_entry_point_exits_with_the_code(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vouch", "nope"])
    with pytest.raises(SystemExit) as stopped:
        command.run()
    assert stopped.value.code == 2
