"""The `vouch` command. Modules of the library are imported inside commands, so that help is immediate."""

from __future__ import annotations

import errno
import os
import sys

import typer

from vouch.cli import claims, compare, data, train
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
claims.add_to(app)


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
    """Run the command line and give its exit code."""
    try:
        result = app(arguments, standalone_mode=False)
        return int(result) if isinstance(result, int) else 0
    except VouchError as error:
        complain(error)
    except KeyboardInterrupt:
        print(
            "\nstopped. Finished work is kept: the same command with --resume (train) or as it was goes on.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        complain(
            VouchError("there is not enough memory", hint="use a smaller batch_size, or a method with less to hold")
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        complain(
            VouchError(
                f"cannot write: {error.strerror}", where=error.filename, hint="free some space, or choose another --out"
            )
        )
    except typer.Exit as done:
        return done.exit_code
    except Exception as error:
        # Errors of the command line itself (a missing option, an unknown command) know how to show themselves.
        show = getattr(error, "show", None)
        if type(error).__name__ == "Abort":
            return 130
        if show is None:
            raise
        show()
    return 2
