"""The pieces of a comparison as Ray tasks, behind the interface of `concurrent.futures`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from vouch.errors import ConfigError


class RayExecutor(Executor):
    """Submits calls to a Ray cluster; one core each.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
    """

    def __init__(self, address: str) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ConfigError("--ray was given, but Ray is not installed", hint="pip install 'vouch[ray]'") from error
        self._ray = ray
        try:
            ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the Ray cluster {address!r} does not answer: {error}", hint="ray start --head"
            ) from error

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(*args, **kwargs)` on the cluster."""
        future: Future[Any] = self._ray.remote(num_cpus=1)(fn).remote(*args, **kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster."""
        self._ray.shutdown()
