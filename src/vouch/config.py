"""Typed settings: one documented class beside each method; errors, help, docs and tuning all come from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, get_args

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from vouch.errors import ConfigError, clause, did_you_mean


@dataclass(frozen=True)
class Span:
    """A numeric range to search, inclusive at both ends; integers if both ends are."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choice:
    """A set of values to search."""

    values: tuple[Any, ...]


Search = Span | Choice


def setting(default: Any, description: str, *, search: Search | None = None, **constraints: Any) -> Any:
    """Declare one setting: its default, what it does, its limits (`ge`, `gt`, `le`, `lt`) and, if tuned, its range."""
    return Field(default, description=description, json_schema_extra=_carry(search), **constraints)


def _carry(search: Search | None) -> Any:
    # pydantic keeps a callable untouched, so the search range can ride on the field it belongs to.
    def extra(schema: dict[str, Any]) -> None:
        del schema

    extra.search = search  # type: ignore[attr-defined]
    return extra


@dataclass(frozen=True)
class SettingRow:
    """One line of a settings table: what the help, the docs page and the errors show."""

    name: str
    type: str
    default: Any
    description: str
    search: Search | None


class Config(BaseModel):
    """Base of every method's settings. Unknown names and bad values raise `ConfigError`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise self._explain(error) from None

    @classmethod
    def parse(cls, assignments: Iterable[str]) -> Self:
        """Build from `key=value` texts, as given to `--set`; `key+=value` adds to a list.

        Raises:
            ConfigError: a text has no `=`, or names an unknown setting, or its value does not fit.
        """
        values: dict[str, Any] = {}
        for text in assignments:
            key, equals, value = (part.strip() for part in text.partition("="))
            if not equals or not key.rstrip("+"):
                raise ConfigError(f"{text!r} is not of the form key=value", hint="for example --set epochs=20")
            name = key.rstrip("+").strip()
            # "none" is no value where there may be none, and a word like any other elsewhere
            optional = name not in cls.model_fields or type(None) in get_args(cls.model_fields[name].annotation)
            given: Any = None if optional and value.lower() in ("none", "null") else value
            default = cls.model_fields[name].default if name in cls.model_fields else None
            if isinstance(default, tuple | list):
                given = [part.strip() for part in value.split(",") if part.strip()]
                given = [*values.get(name, default), *given] if key.endswith("+") else given
            elif key.endswith("+"):
                raise ConfigError(f"{text!r} adds to {name!r}, which is no list", hint=f"--set {name}={value}")
            values[name] = given
        return cls(**values)

    def updated(self, values: Mapping[str, Any]) -> Self:
        """A copy with some settings replaced, validated again."""
        return type(self)(**{**self.model_dump(), **values})

    def value(self, name: str) -> Any:
        """A setting by the name that `rows` gives it."""
        return getattr(self, name)

    @classmethod
    def search_space(cls) -> dict[str, Search]:
        """The settings that tuning may vary, with their ranges."""
        return {row.name: row.search for row in cls.rows() if row.search is not None}

    @classmethod
    def rows(cls) -> list[SettingRow]:
        """The settings table, in order of declaration."""
        schema = cls.model_json_schema()["properties"]
        rows = []
        for name, field in cls.model_fields.items():
            search = getattr(field.json_schema_extra, "search", None)
            rows.append(SettingRow(name, _type_name(schema[name]), field.default, field.description or "", search))
        return rows

    @classmethod
    def _explain(cls, error: pydantic.ValidationError) -> ConfigError:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or cls.__name__
        owner = cls.__name__.removesuffix("Config")
        if first["type"] == "extra_forbidden":
            return ConfigError(
                f"{owner} has no setting {name!r}", where=cls.__name__, hint=did_you_mean(name, cls.model_fields)
            )
        field = cls.model_fields.get(name)
        hint = f"{field.description} (default {field.default!r})" if field else None
        what = f"setting {name!r} of {owner} is {first['input']!r}: {clause(first['msg'])}"
        return ConfigError(what, where=cls.__name__, hint=hint)


def _type_name(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(repr(value) for value in schema["enum"])
    if "const" in schema:
        return repr(schema["const"])
    if "anyOf" in schema:
        return " | ".join(_type_name(option) for option in schema["anyOf"])
    if schema.get("type") == "array":
        return f"list of {_type_name(schema.get('items', {}))}"
    return str(schema.get("type", "value"))
