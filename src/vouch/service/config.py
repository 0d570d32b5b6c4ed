"""The settings of the service: given to `vouch serve`, or as `VOUCH_SERVICE_*` in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from vouch.config import Config, setting
from vouch.errors import ConfigError, did_you_mean

PREFIX = "VOUCH_SERVICE_"
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class ServiceConfig(Config):
    """Where the service finds its run and its database, and the limits it keeps."""

    run: Path = setting(Path("."), "Folder of the run to serve.")
    database: str = setting(
        "", "Database URL (sqlite:///PATH or postgresql://USER:SECRET@HOST/NAME); by default service.db beside the run."
    )
    host: str = setting("127.0.0.1", "Address to listen on.")
    port: int = setting(8000, "Port to listen on; 0 takes a free one.", ge=0, le=65_535)
    workers: int = setting(1, "Processes that answer; they share the memory-mapped model.", ge=1, le=64)
    keys: Literal["auto", "required", "off"] = setting(
        "auto", "Whether API keys are asked for: auto asks unless the service listens on loopback only."
    )
    hosts: tuple[str, ...] = setting((), "Host names that requests may name; loopback names by default, or any.")
    index: Literal["auto", "exact", "hnsw", "ivf"] = setting("auto", "How the nearest items are searched.")
    max_body: int = setting(1 << 20, "Largest request body, in bytes.", ge=1_024, le=1 << 28)
    max_connections: int = setting(1_000, "Connections held at once by a worker; more are closed at once.", ge=1)
    max_waiting: int = setting(512, "Recommendation requests waiting at once; more get 503.", ge=1)
    max_batch: int = setting(64, "Most requests answered by one pass of the model.", ge=1, le=4_096)
    header_seconds: float = setting(10.0, "Time a client has to send a request's head, and then its body.", gt=0)
    idle_seconds: float = setting(15.0, "Time an idle connection is kept.", gt=0)
    answer_seconds: float = setting(10.0, "Time after which a waiting request is given up with 503.", gt=0)
    drain_seconds: float = setting(20.0, "Time that requests under way get when the service stops.", gt=0)
    database_seconds: float = setting(5.0, "Time to wait for a connection or a lock of the database.", gt=0)
    requests_per_second: float = setting(
        200.0, "Requests a key (or address, without keys) may send; 0: any number.", ge=0
    )
    burst: int = setting(400, "Requests above that rate that may come at once.", ge=1)
    poll_seconds: float = setting(1.0, "How often a worker looks for changes made through other workers.", gt=0)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **given: Any) -> Self:
        """Settings of the environment, overridden by those given.

        Raises:
            ConfigError: a variable names no setting, or a value does not fit.
        """
        found: dict[str, Any] = {}
        for variable, value in (os.environ if environment is None else environment).items():
            if variable.startswith(PREFIX):
                name = variable.removeprefix(PREFIX).lower()
                if name not in cls.model_fields:
                    known = [PREFIX + field.upper() for field in cls.model_fields]
                    raise ConfigError(f"there is no setting {variable}", hint=did_you_mean(variable, known))
                found[name] = tuple(filter(None, value.split(","))) if name == "hosts" else value
        return cls(**{**found, **given})

    def to_environment(self) -> dict[str, str]:
        """The settings as variables, for worker processes."""
        values = self.model_dump(mode="json") | {"hosts": ",".join(self.hosts)}
        return {PREFIX + name.upper(): str(value) for name, value in values.items()}

    @property
    def database_url(self) -> str:
        """The URL of the database."""
        return self.database or f"sqlite:///{(self.run.resolve().parent / 'service.db').as_posix()}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the service."""
        return self.host in LOOPBACK

    @property
    def needs_keys(self) -> bool:
        """Whether requests need an API key."""
        return self.keys == "required" or (self.keys == "auto" and not self.is_local)

    @property
    def allowed_hosts(self) -> tuple[str, ...]:
        """Host names that requests may name: a local service answers to loopback names only, so that no web page
        that a browser shows can reach it under a name of its own.
        """
        return self.hosts or ((*LOOPBACK, "[::1]") if self.is_local else ("*",))
