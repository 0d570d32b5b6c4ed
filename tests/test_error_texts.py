"""Texts of other libraries read on in ours, and abbreviations keep their capitals."""

from __future__ import annotations

import pytest

from vouch.config import Config, setting
from vouch.data.filters import Filters
from vouch.errors import ConfigError, clause


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Input should be a valid integer", "input should be a valid integer"),
        ("A number is needed", "a number is needed"),
        ("JSON decode error", "JSON decode error"),
        ("URL scheme should be 'http'", "URL scheme should be 'http'"),
        ("IPv4 address", "IPv4 address"),
        ("Value error, give a user", "give a user"),
        ("", ""),
    ],
)
def test_the_first_letter_is_made_small_unless_it_begins_an_abbreviation(text: str, expected: str) -> None:
    assert clause(text) == expected


def test_settings_are_refused_in_plain_words() -> None:
    class OneConfig(Config):
        """One setting."""

        size: int = setting(1, "how many")

    with pytest.raises(ConfigError, match="is 'x': input should be a valid integer"):
        OneConfig.parse(["size=x"])
    with pytest.raises(ConfigError, match="is 'soon': 'soon', which is no time"):
        Filters(since="soon")
