"""Every Python example of the README and the manual runs, and what they say of the command is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path) -> None:
    for number, code in enumerate(blocks(page, "python")):
        script = tmp_path / f"example_{number}.py"
        script.write_text(code, encoding="utf-8")
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]


def test_commands_of_the_manual_exist() -> None:
    """Each `vouch ...` line of a shell block parses: the command and its options are there."""
    import shlex

    import typer

    from vouch.cli.main import app

    root = typer.main.get_command(app)
    seen = 0
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                if not words or words[0] != "vouch":
                    continue
                command, rest = root, words[1:]
                while hasattr(command, "commands"):
                    assert rest and rest[0] in command.commands, line
                    command, rest = command.commands[rest[0]], rest[1:]
                known = {name for option in command.params for name in option.opts}
                for word in rest:
                    if word.startswith("-"):
                        assert word.partition("=")[0] in known, f"{page.name}: {line}: {word}"
                seen += 1
    assert seen > 15
