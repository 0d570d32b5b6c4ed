"""Who may do what: API keys with roles, and how often.

A key is `vouch_ID_SECRET`. The database holds the SHA-256 of the secret, which is 256 random bits: nothing can be
learned from it, so a slow hash would protect nothing more. Roles include each other: admin > write > read.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from vouch.service.problems import Refused
from vouch.service.schemas import Role
from vouch.service.storage import KeyRow, Store, Unavailable

ROLES: tuple[Role, ...] = ("read", "write", "admin")
COOKIE = "vouch_key"
FRESH_SECONDS = 5.0
"""A key that was looked up is trusted this long: a key taken away stops working within it, in all workers."""
STALE_SECONDS = 300.0
"""While the database is gone, keys looked up before stay good for this long."""
MOST_KEPT = 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks: the id of the key, or None where no keys are asked for."""

    key_id: str | None
    role: Role


def new_key(name: str, role: Role, moment: float) -> tuple[str, KeyRow]:
    """A new key to hand out once, and what to keep of it."""
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    return f"vouch_{id}_{secret}", KeyRow(id, name, role, _hash(secret), int(moment))


def _parts(key: str) -> tuple[str, str]:
    """The id and the secret of a key; an empty id if it does not look like one."""
    prefix, _, rest = key.partition("_")
    id, _, secret = rest.partition("_")
    if prefix != "vouch" or not id.isalnum() or len(key) > 200 or not key.isascii():
        return "", ""
    return id, secret


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """Checks keys, and remembers the answers for a few seconds."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._store, self._clock = store, clock
        self._known: OrderedDict[str, tuple[float, KeyRow | None]] = OrderedDict()

    async def caller(self, key: str) -> Caller | None:
        """Who a key stands for, or None if it is not good.

        Raises:
            Unavailable: the database is gone, and the key was not seen lately.
        """
        id, secret = _parts(key)
        row = await self._row(id) if id else None
        if row is None or not hmac.compare_digest(row.hash, _hash(secret)):
            return None
        return Caller(row.id, row.role)  # type: ignore[arg-type]

    def knows(self, key: str) -> bool:
        """Whether a key with this id was found lately, so that no look into the database is needed."""
        seen = self._known.get(_parts(key)[0])
        return seen is not None and seen[1] is not None and self._clock() - seen[0] < FRESH_SECONDS

    async def _row(self, id: str) -> KeyRow | None:
        now = self._clock()
        seen = self._known.get(id)
        if seen is not None and now - seen[0] < FRESH_SECONDS:
            return seen[1]
        try:
            row = await run_in_threadpool(self._store.find_key, id)
        except Unavailable:
            if seen is not None and now - seen[0] < STALE_SECONDS:
                return seen[1]
            raise
        self._known[id] = (now, row)
        self._known.move_to_end(id)
        while len(self._known) > MOST_KEPT:
            self._known.popitem(last=False)
        return row

    def forget(self, id: str) -> None:
        """Look the key up again when it comes next."""
        self._known.pop(id, None)


class RateLimit:
    """A bucket for each caller that fills at `rate` a second up to `burst`; of a worker, so workers add up."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, who: str) -> float:
        """Take one from the bucket; the seconds to wait if it is empty, else 0."""
        if self.rate == 0:
            return 0.0
        now = self._clock()
        level, at = self._buckets.pop(who, (self.burst, now))
        level = min(self.burst, level + max(0.0, now - at) * self.rate)
        if level < 1:
            self._buckets[who] = (level, now)
            return (1 - level) / self.rate
        self._buckets[who] = (level - 1, now)
        while len(self._buckets) > MOST_KEPT:
            self._buckets.popitem(last=False)
        return 0.0


class Gate:
    """Lets callers with a good key and a sufficient role in."""

    def __init__(self, keys: Keys | None, limit: RateLimit, refused: Callable[[str], None]) -> None:
        self.keys, self.limit, self._refused = keys, limit, refused

    async def enter(self, request: Request, role: Role) -> Caller:
        """Who is asking.

        Raises:
            Refused: 401 without a good key, 403 with too small a role, 429 when asked too often.
        """
        address = f"address {request.client.host if request.client else 'unknown'}"
        caller = Caller(None, "admin")
        if self.keys is not None:
            key = _sent_key(request)
            known = self.keys.knows(key)
            if not known:
                self._slow_down(address)  # guesses cost looks into the database: their sender has few
            found = await self.keys.caller(key) if key else None
            if found is None:
                if known:
                    self._slow_down(address)  # nor many at the secret of a known id
                self._refused("key")
                raise Refused(
                    401,
                    "a valid API key is needed",
                    hint="Authorization: Bearer KEY",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            caller = found
        request.scope["state"]["key_id"] = caller.key_id
        self._slow_down(f"key {caller.key_id}" if caller.key_id else address)
        if ROLES.index(caller.role) < ROLES.index(role):
            self._refused("role")
            raise Refused(403, f"this needs a key with the role {role}; yours has {caller.role}")
        return caller

    def _slow_down(self, who: str) -> None:
        wait = self.limit.wait(who)
        if wait > 0:
            self._refused("rate")
            hint = f"at most {self.limit.rate:g} requests a second"
            raise Refused(429, "too many requests", hint=hint, headers={"Retry-After": str(max(1, round(wait)))})


def _sent_key(request: Request) -> str:
    """The key of a request, or nothing."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if key or not _same_site(request):  # a page of another site may make the browser send its cookie
        return key
    return request.cookies.get(COOKIE, "")


def _same_site(request: Request) -> bool:
    if request.method in ("GET", "HEAD"):
        return True
    origin = request.headers.get("origin")
    return origin is not None and origin.partition("://")[2] == request.headers.get("host")


def needs(role: Role) -> Callable[[Request], Awaitable[Caller]]:
    """A dependency: the route needs a key with this role."""

    async def check(request: Request) -> Caller:
        gate: Any = request.app.state.gate
        return await gate.enter(request, role)

    return check
