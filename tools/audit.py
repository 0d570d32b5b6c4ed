"""Look for known vulnerabilities in the pinned dependencies: `make audit`.

pip-audit asks PyPI, then OSV. It says "no known vulnerabilities" of an index that knows the packages but no advisories,
too. So a version whose flaws have been known for years is asked about first: a service that does not tell of them
proves nothing and is passed over. Where none is left the audit is skipped, with the reason.

Exit code: 0 clean or skipped, 1 something is vulnerable, 2 the audit broke off (or was skipped, with --required).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
SERVICES = ("pypi", "osv")
FLAWED = "urllib3==1.24.1"
PROBE_SECONDS = 15
"""For one question, with the start of the tool."""
AUDIT_SECONDS = 600
ANSWER_SECONDS = 5
ACCEPTED: dict[str, str] = {}
"""Advisories that do not concern us: the id, and why not."""


class NoAnswer(Exception):
    """The service gave no report; the text says why."""


def ask(service: str, requirements: Path, seconds: float) -> list[dict[str, Any]]:
    """What pip-audit reports of pinned requirements, one entry a package.

    Raises:
        NoAnswer: it reported nothing.
    """
    command = [
        sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip",
        "--vulnerability-service", service, "--timeout", str(ANSWER_SECONDS), "--format", "json",
        "--progress-spinner", "off", *(f"--ignore-vuln={id}" for id in ACCEPTED),
    ]  # fmt: skip
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"no answer within {seconds:g} seconds") from None
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except (ValueError, KeyError, TypeError):
        said = done.stderr.strip().splitlines() or [f"pip-audit ended with {done.returncode} and said nothing"]
        raise NoAnswer(said[-1][:300]) from None


def has_advisories(service: str) -> None:
    """Find out whether a service tells of known flaws.

    Raises:
        NoAnswer: it cannot be reached, or does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        flawed = Path(folder) / "requirements.txt"
        flawed.write_text(FLAWED + "\n", encoding="utf-8")
        (found,) = ask(service, flawed, PROBE_SECONDS)
    if not found.get("vulns"):
        raise NoAnswer(f"it answers, but has no advisories: it knows of none for {FLAWED}")


def audit(service: str) -> int:
    """Audit all pinned versions, and print what is found."""
    try:
        reported = ask(service, CONSTRAINTS, AUDIT_SECONDS)
    except NoAnswer as error:
        print(f"audit broke off ({service}): {error}")
        return 2
    flaws = [(each, flaw) for each in reported for flaw in each.get("vulns", ())]
    for each, flaw in flaws:
        fixed = ", ".join(flaw["fix_versions"]) or "no version yet"
        names = " ".join([flaw["id"], *flaw.get("aliases", ())])
        print(f"{each['name']} {each['version']}: {names}, fixed in {fixed}\n    {flaw['description'][:200]}")
    unknown = [each["name"] for each in reported if "version" not in each]
    if unknown:
        print(f"not known to {service}, so not audited: {', '.join(unknown)}")
    print(f"audit: {len(reported) - len(unknown)} pinned packages, known vulnerabilities: {len(flaws)} ({service})")
    return 1 if flaws else 0


def main() -> int:
    """Audit with the first service that has advisories."""
    parser = argparse.ArgumentParser(description="Look for known vulnerabilities in the pinned dependencies.")
    parser.add_argument("--required", action="store_true", help="fail where no advisories can be had")
    required = parser.parse_args().required
    reasons = []
    for service in SERVICES:
        try:
            has_advisories(service)
        except NoAnswer as error:
            reasons.append(f"  {service}: {error}")
            continue
        return audit(service)
    print("\n".join(["audit skipped: no advisories are at hand", *reasons]))
    return 2 if required else 0


if __name__ == "__main__":
    sys.exit(main())
