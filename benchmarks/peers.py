"""The libraries that benchmarks compare with: each in a virtual environment of its own, run as a child process."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE / ".venvs"
RESULTS = HERE / "results"

# Exact where a peer is measured; its own dependencies are left to pip. Pinning PyTorch makes pip take the CPU build.
PEERS: dict[str, tuple[str, ...]] = {
    "recbole": ("torch==2.13.0", "setuptools<81", "numpy==1.26.4", "pandas<3", "recbole==1.2.1"),
    "rectools": ("torch==2.13.0", "setuptools<81", "numpy==1.26.4", "rectools[torch]==0.19.0"),
    "implicit": ("numpy==1.26.4", "implicit==0.7.3", "threadpoolctl"),
    # with what vouch.multitask needs, so that all three run in one process, in turn
    "multitask": (
        "torch==2.13.0",
        "numpy==2.4.6",
        "scipy==1.17.1",
        "pydantic>=2.10,<3",
        "torchjd[cagrad]==0.18.0",
        "LibMTL==1.1.5",
    ),
}


def peer_python(name: str) -> Path:
    """The Python of a peer's environment, made (with pip's messages on stderr) where it is missing or out of date.

    Raises:
        KeyError: no such peer is listed.
        subprocess.CalledProcessError: pip could not install it.
    """
    requirements = PEERS[name]
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    with _alone(ENVIRONMENTS / f"{name}.lock"):
        if stamp.exists() and stamp.read_text() == wanted:
            return python
        print(f"making an environment for {name}: {', '.join(requirements)}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar=off"]
        subprocess.run([*pip, *requirements], check=True, stdout=sys.stderr)
        stamp.write_text(wanted)  # last, so that a broken environment is made again
    return python


def run_peer(name: str, script: str, *args: object, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a script of this folder in a peer's environment; the last line it prints must be one JSON object.

    Args:
        args: what the script gets; paths must be absolute, as it runs in an empty folder.
        env: variables to set besides the present ones, such as `{"OPENBLAS_NUM_THREADS": "1"}`.

    Raises:
        subprocess.CalledProcessError: the script failed; what it printed on stderr has been shown.
    """
    python = peer_python(name)
    with tempfile.TemporaryDirectory() as folder:  # some peers leave logs where they are run
        done = subprocess.run(
            [str(python), str(HERE / script), *map(str, args)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=folder,
        )
    lines = done.stdout.strip().splitlines()
    if not lines:
        raise ValueError(f"{script} printed nothing")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` with the machine and versions it was measured on."""
    from vouch.files import write_json

    path = RESULTS / f"{name}.json"
    write_json(path, {**result, "machine": machine()})
    return path


def machine() -> dict[str, Any]:
    """Processor, cores, threads and the versions that matter."""
    import platform
    from importlib.metadata import version

    import torch

    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") if Path("/proc/cpuinfo").exists() else open(os.devnull) as lines:
        for line in lines:
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {name: version(name) for name in ("torch", "numpy", "scipy", "polars")}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock file, so that two benchmarks do not make the same environment at once."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":  # python benchmarks/peers.py [NAME ...]: make the environments ahead of time
    for chosen in sys.argv[1:] or PEERS:
        print(peer_python(chosen))
