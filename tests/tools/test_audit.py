"""The audit fails on a known flaw, and on nothing else; it never calls clean what nobody has looked at."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent.parent / "tools" / "audit.py"
# Stands in for pip-audit: by service, what the network would make it do. It writes its report as pip-audit does.
FAKE = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
behaviour = os.environ["FAKE_" + arguments[arguments.index("--vulnerability-service") + 1].upper()]
pins = [line.split("==") for line in pathlib.Path(arguments[arguments.index("--requirement") + 1]).read_text().split()
        if "==" in line]
flaw = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["9.9"], "description": "it leaks"}
if behaviour == "away":
    sys.exit("Traceback (most recent call last):\\nConnectionError: no such host")
if behaviour == "breaks" and len(pins) > 1:
    sys.exit("ServiceError: 503")
def report(name, version):
    if behaviour == "empty":
        return {"name": name, "skip_reason": "not found"}
    if behaviour == "partly" and name == "torch":
        return {"name": name, "skip_reason": "not found"}
    flawed = name == "urllib3" and version == "1.24.1" or behaviour == "flawed" and name == "torch"
    return {"name": name, "version": version, "vulns": [flaw] if flawed and behaviour != "mute" else []}
print(json.dumps({"dependencies": [report(*pin) for pin in pins], "fixes": []}))
"""


def run(folder: Path, pypi: str, osv: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "pip_audit.py").write_text(FAKE, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(folder), "FAKE_PYPI": pypi, "FAKE_OSV": osv}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_without_network_it_is_skipped_with_the_reason(tmp_path: Path) -> None:
    done = run(tmp_path, "away", "away")
    assert done.returncode == 0
    assert "skipped" in done.stdout
    assert "pypi: ConnectionError: no such host" in done.stdout and "osv:" in done.stdout
    assert run(tmp_path, "away", "away", "--required").returncode == 2


@pytest.mark.parametrize("index", ["empty", "mute"])
def test_an_index_without_advisories_proves_nothing(tmp_path: Path, index: str) -> None:
    """pip-audit itself would say that no vulnerabilities are known."""
    done = run(tmp_path, index, index)
    assert done.returncode == 0
    assert "skipped" in done.stdout and "has no advisories" in done.stdout
    assert "known vulnerabilities" not in done.stdout


def test_a_flaw_fails_and_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "mute", "flawed")  # the first service is passed over
    assert done.returncode == 1
    assert "PYSEC-1 CVE-1, fixed in 9.9" in done.stdout and "torch" in done.stdout
    assert "known vulnerabilities: 1 (osv)" in done.stdout


def test_clean_packages_pass_and_those_not_audited_are_named(tmp_path: Path) -> None:
    done = run(tmp_path, "partly", "away")
    assert done.returncode == 0
    assert "known vulnerabilities: 0 (pypi)" in done.stdout and "not audited: torch" in done.stdout


def test_an_audit_that_breaks_off_is_no_success(tmp_path: Path) -> None:
    done = run(tmp_path, "breaks", "away")
    assert done.returncode == 2
    assert "broke off" in done.stdout and "503" in done.stdout


def test_a_service_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("audit_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "pip_audit.py").write_text("import time; time.sleep(60)", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(script, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(sys, "argv", ["audit.py"])
    assert script.main() == 0
    with pytest.raises(script.NoAnswer, match=r"within 0\.2 seconds"):
        script.has_advisories("pypi")
