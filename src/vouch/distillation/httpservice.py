"""A prediction service behind an address, which speaks JSON or NumPy's file format."""

from __future__ import annotations

import io
import json
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vouch.distillation.apis import NotServedError
from vouch.errors import ConfigError


@dataclass(frozen=True)
class HttpService:
    """A service behind an address, asked with POST requests over the standard library; it follows no redirects.

    With `json` the body is `{"inputs": [[[[...]]]]}` and the answer `{"probabilities": [[...]]}`, or the list alone;
    with `npy` both are arrays in NumPy's file format.

    Attributes:
        url: http or https.
        timeout: seconds until a request that is not answered counts as failed.
        headers: more headers, such as `Authorization`; never logged or saved.
    """

    url: str
    format: Literal["json", "npy"] = "json"
    timeout: float = 30.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the address and the format.

        Raises:
            ConfigError: either is none that this can speak.
        """
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"{self.url!r} is no address of a service", hint="give http://... or https://...")
        if self.format not in ("json", "npy"):
            raise ConfigError(f"format is {self.format!r}", hint="use json or npy")
        if self.timeout <= 0:
            raise ConfigError(f"timeout is {self.timeout}; it must be above 0")

    def __call__(self, inputs: NDArray[np.float32]) -> Any:
        """Ask once.

        Raises:
            NotServedError: the service was not reached, is busy (429, 503), or refuses the request.
            OSError, ValueError: the request was taken on and not answered, or not in the format.
        """
        body, kind = self._encode(inputs)
        headers = {"Content-Type": kind, "Accept": kind, **self.headers}
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with _OPENER.open(request, timeout=self.timeout) as response:
                return self._decode(self._body(response))
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.reason}"
            if error.code in (429, 503):
                raise NotServedError(reason, wait=_seconds(error.headers.get("Retry-After"))) from error
            if error.code < 500 and error.code != 408:
                raise NotServedError(reason, again=False) from error
            raise
        except urllib.error.URLError as error:
            if isinstance(error.reason, (ConnectionRefusedError, socket.gaierror, ssl.SSLError)):
                raise NotServedError(str(error.reason)) from error
            raise  # it may have arrived

    def _body(self, response: Any) -> bytes:
        """All of an answer; one that comes in drops may take no longer than another."""
        parts, end = [], time.monotonic() + self.timeout
        while part := response.read1(1 << 16):
            parts.append(part)
            if time.monotonic() > end:
                raise TimeoutError(f"no whole answer in {self.timeout} s")
        return b"".join(parts)

    def _encode(self, inputs: NDArray[np.float32]) -> tuple[bytes, str]:
        if self.format == "json":
            return json.dumps({"inputs": inputs.tolist()}).encode(), "application/json"
        buffer = io.BytesIO()
        np.save(buffer, inputs, allow_pickle=False)
        return buffer.getvalue(), "application/x-npy"

    def _decode(self, body: bytes) -> Any:
        if self.format == "npy":
            return np.load(io.BytesIO(body), allow_pickle=False)
        found = json.loads(body)
        return found["probabilities"] if isinstance(found, dict) and "probabilities" in found else found


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects are refusals: they would turn a POST into a GET, and carry secret headers elsewhere."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """No new request."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _seconds(text: str | None) -> float | None:
    """A Retry-After in seconds; dates are left to the backoff."""
    return float(text) if text is not None and text.strip().isdecimal() else None
