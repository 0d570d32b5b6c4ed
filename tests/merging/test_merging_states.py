"""Families of states: what is merged and what is not, refusals, files, and memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from vouch.errors import ConfigError, DataError, StorageError
from vouch.merging.arithmetic import average, task_arithmetic
from vouch.merging.states import Family
from vouch.merging.stored import StateFile, fingerprint, open_state, read_record, save_state
from vouch.merging.ties import ties


def state(value: float = 0.0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"w": torch.randn(3, 2) + value, "b": torch.randn(3) + value, **more}


def test_differences_are_named() -> None:
    base = state(head=torch.zeros(2, 3))
    other = {"w": torch.zeros(3, 4), "head": torch.zeros(2, 3).double(), "extra": torch.zeros(1)}
    with pytest.raises(DataError) as raised:
        task_arithmetic(base, {"fine": state(head=torch.ones(2, 3)), "odd": other})
    text = str(raised.value)
    for part in ("'odd' is not of the architecture of the base", "'w' has the shape (3, 4), not (3, 2)", "'b' is missing",
                 "'head' is of type torch.float64, not torch.float32", "'extra' is not in the base"):  # fmt: skip
        assert part in text
    many = {f"layer {n}": torch.zeros(1) for n in range(9)}
    with pytest.raises(DataError, match="'layer 4' is missing; and 4 more"):
        average([many, {}, many])
    with pytest.raises(DataError, match="of model 'model 0'"):
        average([state(), {"w": torch.zeros(3, 2)}])


def test_values_that_are_not_finite_are_refused() -> None:
    bad = state()
    bad["b"] = torch.tensor([0.0, math.nan, 0.0])
    for arguments in ([state(), bad], [bad, state()]):
        with pytest.raises(DataError, match=r"'b' of model 'model [01]' has values that are not finite"):
            average(arguments)
    with pytest.raises(DataError, match="'b' of the base"):
        task_arithmetic(bad, [state()])
    large = {"w": torch.full((2,), 60_000.0, dtype=torch.float16)}
    zero = {"w": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(DataError, match=r"not finite in torch.float16"):
        task_arithmetic(zero, [large, large], 1.0)


def test_what_is_not_merged() -> None:
    count, flag = torch.tensor(7), torch.tensor([True, False])
    base = state(count=count, flag=flag, **{"head.w": torch.zeros(2)})
    models = [state(v, count=torch.tensor(9 + int(v)), flag=~flag, **{"head.w": torch.full((k,), v)})
              for k, v in ((2, 1.0), (5, 2.0))]  # fmt: skip
    found = task_arithmetic(base, models, 0.5, exclude=["head.*"], max_distance=None)
    assert found["count"] == 7 and torch.equal(found["flag"], flag) and torch.equal(found["head.w"], base["head.w"])
    torch.testing.assert_close(found["w"], base["w"] + 1.5)
    without = average(models, exclude=["head.*"])
    assert set(without) == {"w", "b", "count", "flag"} and without["count"] == 11
    assert torch.equal(average(models[::-1], exclude="head.*")["count"], without["count"])
    with pytest.raises(DataError, match=r"'head.w' has the shape \(5,\)"):
        average(models)
    with pytest.raises(DataError, match="no tensor of floating point"):
        average([{"n": torch.tensor(1)}] * 2)
    with pytest.raises(DataError, match="complex"):
        average([{"z": torch.zeros(2, dtype=torch.complex64), "w": torch.ones(1)}] * 2)


def test_running_statistics_are_averaged_and_flagged() -> None:
    nets = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2)]
    for number, net in enumerate(nets):
        net(torch.randn(8, 2) + number)
    states = [net.state_dict() for net in nets]
    with pytest.warns(UserWarning, match=r"2 running statistics.*1.running_mean"):
        found = task_arithmetic(states[0], states, 0.9, max_distance=None)
    torch.testing.assert_close(found["1.running_mean"], (states[0]["1.running_mean"] + states[1]["1.running_mean"]) / 2)


def test_types(tmp_path: Path) -> None:
    base, models = state(), [state(0.25), state(0.5)]
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        cast = [{name: x.to(dtype) for name, x in each.items()} for each in (base, *models)]
        found = task_arithmetic(cast[0], cast[1:], 0.5)
        assert all(x.dtype == dtype for x in found.values())
        in_wide = task_arithmetic(*[{n: x.double() for n, x in c.items()} for c in cast[:1]],
                                  [{n: x.double() for n, x in c.items()} for c in cast[1:]], 0.5)  # fmt: skip
        for name in base:  # nothing is lost but the last rounding
            torch.testing.assert_close(found[name].double(), in_wide[name].to(dtype).double(), rtol=4e-3, atol=1e-6)
            if dtype == torch.float64:
                assert torch.equal(found[name], in_wide[name])


def test_tied_tensors_stay_tied_and_count_once() -> None:
    shared = torch.randn(4, 2)
    base = {"in": shared, "mid": torch.randn(3), "out": shared}
    moved = shared + 0.1
    model = {"in": moved, "mid": base["mid"] + 0.1, "out": moved}
    family = Family([model], base)
    assert family.parameters == ["in", "mid"] and family.tied == {"out": "in"}
    found = ties(base, [model], keep=0.5)
    assert found["in"] is found["out"] and list(found) == ["in", "mid", "out"]


def test_files_are_as_states_in_memory(tmp_path: Path) -> None:
    base, models = state(count=torch.tensor(3), s=torch.tensor(0.5)), {}
    for name, value in (("a", 0.1), ("b", -0.2)):
        models[name] = state(value, count=torch.tensor(4), s=torch.tensor(0.5 + value))
        save_file(models[name], tmp_path / f"{name}.safetensors")
    save_file(base, tmp_path / "base.safetensors")
    files = [tmp_path / "a.safetensors", str(tmp_path / "b.safetensors")]
    for method in (task_arithmetic, ties):
        wanted = method(base, models)
        found = method(tmp_path / "base.safetensors", files, out=tmp_path / "made" / "merged.safetensors")
        assert isinstance(found, StateFile) and set(found) == set(wanted)
        loaded = load_file(tmp_path / "made" / "merged.safetensors")
        for name, tensor in wanted.items():
            assert torch.equal(loaded[name], tensor) and torch.equal(found[name], tensor)
            assert loaded[name].dtype == tensor.dtype
    record = read_record(found.path)
    assert record["method"] == "ties" and record["settings"] == {"weight": 0.3, "keep": 0.2, "merge": "sum"}
    import hashlib

    digest = hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert record["models"]["a"] == {"path": str(tmp_path / "a.safetensors"), "sha256": digest}
    assert record["base"]["path"].endswith("base.safetensors")
    with pytest.raises(StorageError, match="no record"):
        read_record(tmp_path / "a.safetensors")


def test_sharded_files(tmp_path: Path) -> None:
    whole = state(0.3)
    save_file({"w": whole["w"]}, tmp_path / "part-1.safetensors")
    save_file({"b": whole["b"]}, tmp_path / "part-2.safetensors")
    index = {"weight_map": {"w": "part-1.safetensors", "b": "part-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = open_state(tmp_path / "model.safetensors.index.json")
    assert all(torch.equal(found[name], whole[name]) for name in whole) and len(found) == 2
    torch.testing.assert_close(average([found, state()])["w"], state(0.15)["w"])


def test_every_type_survives_the_file(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool, torch.complex64]  # fmt: skip
    mixed = {str(kind): torch.arange(7).to(kind) for kind in kinds}
    mixed |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.5), "turned": torch.arange(6.0).view(2, 3).T}
    save_state(tmp_path / "mixed.safetensors", mixed)
    loaded = load_file(tmp_path / "mixed.safetensors")
    assert set(loaded) == set(mixed)
    for name, tensor in mixed.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_fingerprints_tell_states_apart() -> None:
    one = state()
    assert fingerprint(one) == fingerprint(dict(reversed(one.items())))
    assert fingerprint(one) != fingerprint(state(1e-3))
    assert fingerprint(one) != fingerprint({"w": one["w"].reshape(2, 3), "b": one["b"]})


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    far = {name: 100 + 0 * x for name, x in state().items()}
    bad = {**state(), "w": torch.full((3, 2), math.inf)}
    for broken in (far, bad):
        with pytest.raises(DataError):
            task_arithmetic(state(), [broken], out=out)
        assert not list(tmp_path.iterdir())
    save_state(out, state())
    before = out.read_bytes()
    with pytest.raises(DataError):
        task_arithmetic(out, [far], out=out)
    assert out.read_bytes() == before
    task_arithmetic(out, [state(0.1)], out=out)  # over its own base
    torch.testing.assert_close(load_file(out)["w"], state(0.03)["w"])
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError):
        average([state()], out=tmp_path / "file" / "merged.safetensors")


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "not.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(StorageError, match="cannot be read as safetensors"):
        average([tmp_path / "not.safetensors"])
    with pytest.raises(StorageError, match="no file"):
        average([tmp_path / "missing.safetensors"])
    with pytest.raises(ConfigError, match="single state"):
        average(state())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no model"):
        average([])
    with pytest.raises(ConfigError, match="'w' is a list"):
        average([{"w": [1, 2]}])  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="a int is no state"):
        average([3])  # type: ignore[list-item]


def test_a_checkpoint_larger_than_memory_is_merged(tmp_path: Path) -> None:
    """Merging three files takes far less memory than one of them is long; pages of files are not counted."""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read as Linux tells it")
    tensors = {f"{i:02}": torch.full((128, 1024), float(i)) for i in range(80)}  # 40 MiB, 0.5 MiB each
    for n, who in enumerate(("base", "a", "b")):
        save_file({name: x + 0.1 * n for name, x in tensors.items()}, tmp_path / f"{who}.safetensors")
    code = """
import sys, threading, time, torch
from vouch.merging.arithmetic import task_arithmetic
from vouch.merging.ties import ties
torch.set_num_threads(1)
folder, peak, done = sys.argv[1], 0, threading.Event()
def held():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, held())
files = [f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
task_arithmetic({"w": torch.ones(9)}, [{"w": torch.ones(9)}])
begin = peak = held()
threading.Thread(target=watch, daemon=True).start()
ties(f"{folder}/base.safetensors", files, 1.0, keep=1.0, max_distance=None, out=f"{folder}/merged.safetensors")
streamed = peak - begin
task_arithmetic(f"{folder}/base.safetensors", files, max_distance=None)
print(streamed, peak - begin)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    streamed, whole = map(float, done.stdout.split())
    assert streamed < 20 and whole > 36, done.stdout
    with safe_open(tmp_path / "merged.safetensors", framework="pt") as merged:
        torch.testing.assert_close(merged.get_tensor("79"), tensors["79"] + 0.3)
