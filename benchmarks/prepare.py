"""Preparing and opening a 20-million-row Parquet log of the world, and how fast the command and the import are.

Each step runs in a process of its own, whose peak memory is read from the system. Targets: preparing under 60 s and
3 GB, opening under 1 s and 200 MB resident (without PyTorch, which opening does not need); `vouch --help` under 0.4 s;
`import vouch` under 0.5 s beyond `import torch`.

    python benchmarks/prepare.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from peers import write_result

ROWS = 20_000_000
STEP = """
import json, resource, time
begin = time.perf_counter()
{code}
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({{"seconds": time.perf_counter() - begin, "peak_mb": peak}}))
"""


def step(code: str) -> dict[str, Any]:
    """Run code in a fresh process; wall seconds and peak resident MiB."""
    done = subprocess.run([sys.executable, "-c", STEP.format(code=code)], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, print, write `results/prepare.json`."""
    result: dict[str, Any] = {"rows_aimed_at": ROWS}
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "world.parquet", Path(folder) / "prepared"
        world = f"WorldConfig(users=600_000, items=50_000, events={ROWS})"
        result["write"] = step(f"from vouch.data.world import *; write_log({world}, {str(log)!r})")
        result["prepare"] = step(f"from vouch.data.prepare import prepare; prepare({str(log)!r}, {str(out)!r})")
        opening = f"from vouch.data import Dataset; rows = len(Dataset.open({str(out)!r}).interactions)"
        result["open"] = step(opening)
        result["nothing"] = step("import numpy, polars")
    vouch = str(Path(sys.executable).with_name("vouch"))
    helps, torch_only, both = [], [], []
    for _ in range(7):
        helps.append(
            step(f"import subprocess; subprocess.run([{vouch!r}, '--help'], stdout=subprocess.DEVNULL)")["seconds"]
        )
        torch_only.append(step("import torch")["seconds"])
        both.append(step("import torch, vouch; vouch.Interactions, vouch.evaluate, vouch.method")["seconds"])
    result["help_seconds"] = median(helps)
    result["import_beyond_torch_seconds"] = median(both) - median(torch_only)
    result["met"] = {
        "prepare": result["prepare"]["seconds"] < 60 and result["prepare"]["peak_mb"] < 3000,
        "open": result["open"]["seconds"] < 1 and result["open"]["peak_mb"] < 200,
        "help": result["help_seconds"] < 0.4,
        "import": result["import_beyond_torch_seconds"] < 0.5,
    }
    print(json.dumps(result, indent=2))
    write_result("prepare", result)


if __name__ == "__main__":
    main()
