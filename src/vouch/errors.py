"""The errors of the library: each says what is wrong, where it is, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VouchError(Exception):
    """Anything a user can cause and can mend. The command line prints it and exits with code 2.

    Args:
        what: One sentence that says what is wrong and shows the offending value.
        where: The file, line, column or setting it was found at.
        hint: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"\n  where: {self.where}" if self.where else ""
        hint = f"\n  try:   {self.hint}" if self.hint else ""
        return f"{self.what}{where}{hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments need help to cross a process boundary.
        return (_rebuild, (type(self), self.what, self.where, self.hint))


def _rebuild(cls: type[VouchError], what: str, where: str | None, hint: str | None) -> VouchError:
    return cls(what, where=where, hint=hint)


class DataError(VouchError):
    """The input data cannot be used as it is."""


class ConfigError(VouchError):
    """A setting, an option or an argument has a value that cannot be used."""


class UnknownIdError(VouchError):
    """A user, item, method or setting was named that does not exist."""


class StorageError(VouchError):
    """A file or folder could not be read or written."""


class TrainingError(VouchError):
    """Training cannot go on (a loss that is not a number, no negative to draw, ...)."""


def clause(text: str) -> str:
    """A sentence of another library as it goes on after a colon: a small first letter, unless the word is an abbreviation."""
    text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    first = text.split(maxsplit=1)[0] if text.strip() else ""
    return text if first[1:] != first[1:].lower() else text[:1].lower() + text[1:]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest known words, or all of them where there are few."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(repr(word) for word in close)}?"
    if len(names) <= 30:
        return f"known are: {', '.join(names)}"
    return f"known are {len(names)} names, such as {', '.join(names[:8])}"
