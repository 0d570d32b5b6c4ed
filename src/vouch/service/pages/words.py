"""Numbers and texts as the pages write them."""

from __future__ import annotations

from typing import Any

NOTHING = "\N{EN DASH}"


def number(value: Any, digits: int = 4) -> str:
    """`0.1234`; a dash for what is missing or no number."""
    return NOTHING if not isinstance(value, int | float) or value != value else f"{value:,.{digits}f}"


def signed(value: Any, digits: int = 4) -> str:
    """`+0.1234`, with a real minus sign."""
    return (
        NOTHING
        if not isinstance(value, int | float) or value != value
        else f"{value:+,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    )


def whole(value: Any) -> str:
    """`12,345`."""
    return f"{value:,.0f}" if isinstance(value, int | float) else NOTHING


def sentence(text: str) -> str:
    """With a great letter in front and a full stop behind."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def brief(title: str, most: int = 40) -> str:
    """A title as one would say it in passing: what stands before its first comma, and not too much of that."""
    short = title.partition(",")[0].strip() or title
    return short if len(short) <= most else short[: most - 1].rstrip() + "…"
