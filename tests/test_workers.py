"""Worker processes end with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MAIN = """
import os, sys, time
from pathlib import Path
from vouch.workers import processes

def work(folder):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)

if __name__ == "__main__":
    with processes(2) as pool:
        for done in [pool.submit(work, sys.argv[1]) for _ in range(2)]:
            done.result()
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc to look for processes in")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_no_workers(how: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "pids").mkdir()
    (tmp_path / "main.py").write_text(MAIN)
    main = subprocess.Popen([sys.executable, str(tmp_path / "main.py"), str(tmp_path / "pids")])
    until = time.monotonic() + 60
    while len(workers := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert time.monotonic() < until and main.poll() is None
        time.sleep(0.05)
    os.kill(main.pid, how)
    main.wait()
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.05)
