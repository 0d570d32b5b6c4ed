"""Settings refuse what is no number, whatever limits they have."""

from __future__ import annotations

import math

import pytest

from vouch.config import Config, setting
from vouch.errors import ConfigError


class Some(Config):
    at_least: float = setting(1.0, "a share", ge=0)
    free: float = setting(1.0, "a factor")


@pytest.mark.parametrize("name", ["at_least", "free"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "inf", "nan"])
def test_a_setting_must_be_finite(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' of Some is"):
        Some(**{name: value})
    with pytest.raises(ConfigError, match=f"'{name}' of Some is"):
        Some.parse([f"{name}={value}"])
