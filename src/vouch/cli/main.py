"""The `vouch` command. Modules of the library are imported inside commands, so that help is immediate."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import typer

from vouch.cli import claims, compare, data, distil, export, merge, serve, train
from vouch.cli.shared import complain
from vouch.errors import VouchError

app = typer.Typer(
    name="vouch",
    help="Recommendations you can vouch for: compare methods on your data, train the best, and see its evidence.",
    epilog="Begin with: vouch demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
data.add_to(app)
train.add_to(app)
compare.add_to(app)
distil.add_to(app)
merge.add_to(app)
claims.add_to(app)
export.add_to(app)
serve.add_to(app)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Recommendations you can vouch for."""
    if version:
        import vouch

        typer.echo(vouch.__version__)
        raise typer.Exit


def run() -> None:
    """Entry point: errors of the user become one message and exit code 2."""
    sys.exit(main())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and give its exit code: 0, 2 for what the user can mend, 130 when stopped."""
    command = typer.main.get_command(app)
    _suggest_once(command)
    try:
        # Invoked without typer's own `main`, which would swallow an interrupt and a closed pipe.
        with command.make_context("vouch", sys.argv[1:] if arguments is None else list(arguments)) as context:
            command.invoke(context)
        sys.stdout.flush()
        return 0
    except VouchError as error:
        complain(error)
    except KeyboardInterrupt:
        print("\nstopped. Finished work is kept: the same command goes on from it.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        complain(_explain(error))
    except Exception as error:
        name = type(error).__name__
        if name == "Exit":
            return int(getattr(error, "exit_code", 0))
        if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
            hint = "use a smaller batch_size, or a method with less to hold"
            complain(VouchError("there is not enough memory", hint=hint))
            return 2
        # Errors of the command line itself (a missing option, an unknown command) know how to show themselves.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
    return 2


def _explain(error: OSError) -> VouchError:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return VouchError(
            f"cannot write: {reason}", where=error.filename, hint="free some space, or choose another --out"
        )
    return VouchError(
        f"cannot read or write: {reason}", where=error.filename, hint="check the path and its permissions"
    )


def _suggest_once(command: Any) -> None:
    """Leave 'did you mean' to click where it has it: typer would say it again."""
    command.suggest_commands = False
    for inner in getattr(command, "commands", {}).values():
        _suggest_once(inner)
