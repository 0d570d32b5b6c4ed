"""Keys, roles, rates, hosts, headers, and what the logs hold."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from small_server import PlainEngine

from vouch.service import security
from vouch.service.logs import JsonLines
from vouch.service.middleware import SECURITY_HEADERS
from vouch.service.security import Keys, RateLimit, new_key
from vouch.service.storage import KeyRow, Store, Unavailable

Start = Callable[..., TestClient]
ASK = {"user": "known", "k": 1}
EVENTS = {"events": [{"id": "1", "user": "u", "item": "i1"}]}
# What each role may do, one route a line: role needed, method, path, body.
ROUTES: list[tuple[str, str, str, Any]] = [
    ("read", "POST", "/v1/recommend", ASK),
    ("read", "POST", "/v1/similar", {"item": "i1"}),
    ("read", "POST", "/v1/explain", {"user": "known", "item": "i3"}),
    ("read", "POST", "/v1/users/history", {"user": "known"}),
    ("read", "GET", "/v1/items/i1", None),
    ("read", "GET", "/v1/pictures/i1", None),
    ("read", "GET", "/v1/card", None),
    ("write", "POST", "/v1/events", EVENTS),
    ("write", "POST", "/v1/feedback", {"id": "1", "user": "u", "item": "i1", "kind": "like"}),
    ("write", "PUT", "/v1/items", {"items": [{"id": "i1"}]}),
    ("write", "DELETE", "/v1/items/i1", None),
    ("admin", "POST", "/v1/users/erase", {"user": "u"}),
    ("admin", "PUT", "/v1/audits/attack", {"summary": "s"}),
    ("admin", "PUT", "/v1/model", {"run": "best"}),
    ("admin", "POST", "/v1/keys", {"name": "n", "role": "read"}),
    ("admin", "GET", "/v1/keys", None),
    ("admin", "DELETE", "/v1/keys/none", None),
]


@pytest.fixture(scope="module")
def secured(start_shared: Start) -> tuple[TestClient, dict[str, str]]:
    """A service that asks for keys, and a key of each role."""
    client = start_shared(PlainEngine, keys="required")
    store: Store = client.app.state.store  # type: ignore[attr-defined]
    made = {}
    for role in security.ROLES:
        made[role], row = new_key(f"{role} key", role, 0)
        store.add_key(row)
    return client, made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# Keys and roles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("needed", "method", "path", "body"), ROUTES)
def test_each_route_needs_its_role(
    secured: tuple[TestClient, dict[str, str]], needed: str, method: str, path: str, body: Any
) -> None:
    client, keys = secured
    assert client.request(method, path, json=body).status_code == 401
    for role, key in keys.items():
        answer = client.request(method, path, json=body, headers=bearer(key))
        if security.ROLES.index(role) < security.ROLES.index(needed):  # type: ignore[arg-type]
            assert answer.status_code == 403
            assert needed in answer.json()["error"]["what"]
        else:
            assert answer.status_code in (200, 404), answer.text


def test_every_route_is_in_the_list_of_roles(shared: TestClient) -> None:
    described = shared.get("/v1/openapi.json").json()["paths"]
    listed = {(method, path.replace("i1", "{item}").replace("none", "{id}")) for _, method, path, _ in ROUTES}
    listed = {(method, path.replace("audits/attack", "audits/{slot}")) for method, path in listed}
    asked = {
        (method.upper(), path) for path, methods in described.items() for method in methods if path.startswith("/v1/")
    }
    assert asked == listed


@pytest.mark.parametrize(
    "wrong",
    ["", "x", "vouch", "vouch_", "vouch__", "vouch_{id}_", "vouch_{id}_wrong", "vouch_none_{secret}", "{id}_{secret}",
     "vouch_{id}_{secret}x", "vouch_{id}_{secret}" + "y" * 10_000, "vouch_' OR 1=1 --_{secret}", "vouch_é_x"],
)  # fmt: skip
def test_wrong_keys_are_refused(secured: tuple[TestClient, dict[str, str]], wrong: str) -> None:
    client, keys = secured
    _, id, secret = keys["admin"].split("_", 2)
    key = wrong.format(id=id, secret=secret)
    for header in ({"Authorization": f"Bearer {key}".encode()}, {"X-API-Key": key.encode()}):
        answer = client.get("/v1/card", headers=header)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_may_come_as_bearer_or_in_its_own_header(secured: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = secured
    assert client.get("/v1/card", headers={"Authorization": f"bearer {keys['read']}"}).status_code == 200
    assert client.get("/v1/card", headers={"X-API-Key": keys["read"]}).status_code == 200


def test_a_cookie_counts_only_for_requests_of_the_same_site(
    secured: tuple[TestClient, dict[str, str]], request: pytest.FixtureRequest
) -> None:
    client, keys = secured
    client.cookies.set(security.COOKIE, keys["write"])
    request.addfinalizer(client.cookies.clear)
    assert client.get("/v1/card").status_code == 200
    assert client.post("/v1/events", json=EVENTS).status_code == 401
    assert client.post("/v1/events", json=EVENTS, headers={"Origin": "http://evil.example"}).status_code == 401
    assert client.post("/v1/events", json=EVENTS, headers={"Origin": "http://testserver"}).status_code == 200


def test_keys_are_made_listed_and_taken_away(secured: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = secured
    admin = bearer(keys["admin"])
    made = client.post("/v1/keys", json={"name": "<b>shop</b>", "role": "write"}, headers=admin).json()
    assert client.post("/v1/events", json=EVENTS, headers=bearer(made["key"])).status_code == 200
    listed = client.get("/v1/keys", headers=admin)
    assert made["id"] in [key["id"] for key in listed.json()["keys"]]
    assert "hash" not in listed.text
    assert made["key"].split("_", 2)[2] not in listed.text
    assert client.delete(f"/v1/keys/{made['id']}", headers=admin).json() == {"deleted": True}
    assert client.post("/v1/events", json=EVENTS, headers=bearer(made["key"])).status_code == 401
    assert client.delete(f"/v1/keys/{made['id']}", headers=admin).status_code == 404


def test_the_database_never_holds_a_secret(secured: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = secured
    runs: Path = client.app.state.config.run.parent  # type: ignore[attr-defined]
    client.get("/v1/card", headers=bearer(keys["read"]))
    stored = b"".join(file.read_bytes() for file in runs.glob("service.db*"))
    for key in keys.values():
        id, secret = key.split("_", 2)[1:]
        assert id.encode() in stored
        assert secret.encode() not in stored


class Once:
    """A store that can be asked for a key, until it is gone."""

    def __init__(self, row: KeyRow | None) -> None:
        self.row, self.gone, self.asked = row, False, 0

    def find_key(self, id: str) -> KeyRow | None:
        self.asked += 1
        if self.gone:
            raise Unavailable("gone")
        return self.row


def test_a_key_is_looked_up_again_after_seconds_and_lasts_while_the_database_is_gone() -> None:
    key, row = new_key("n", "read", 0)
    now = [0.0]
    store = Once(row)
    keys = Keys(store, lambda: now[0])  # type: ignore[arg-type]

    def good() -> bool:
        return asyncio.run(keys.caller(key)) is not None

    assert good() and good()
    assert store.asked == 1
    now[0] += security.FRESH_SECONDS + 1
    store.gone = True
    assert good()
    now[0] += security.STALE_SECONDS
    with pytest.raises(Unavailable):
        good()
    store.gone, store.row = False, None
    assert not good()


# Rates, hosts, headers ----------------------------------------------------------------------------------------------


def test_a_bucket_fills_at_its_rate() -> None:
    now = [0.0]
    limit = RateLimit(2.0, 3, lambda: now[0])
    assert [limit.wait("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert limit.wait("b") == 0
    now[0] += 0.5
    assert [limit.wait("a") > 0 for _ in range(2)] == [False, True]
    now[0] -= 100  # a clock that goes backwards gives nothing and takes nothing
    assert limit.wait("a") > 0
    now[0] += 200
    assert [limit.wait("a") for _ in range(3)] == [0, 0, 0]
    assert limit.wait("a") > 0
    assert RateLimit(0, 1).wait("a") == 0


def test_buckets_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MOST_KEPT", 10)
    limit = RateLimit(1.0, 1)
    for number in range(100):
        limit.wait(str(number))
    assert len(limit._buckets) == 10


def test_who_asks_too_often_is_told_to_wait(start: Start) -> None:
    client = start(PlainEngine, requests_per_second=0.5, burst=3)
    statuses = [client.post("/v1/recommend", json=ASK) for _ in range(5)]
    assert [answer.status_code for answer in statuses] == [200, 200, 200, 429, 429]
    assert int(statuses[-1].headers["retry-after"]) >= 1
    assert client.get("/healthz").status_code == 200


def test_guessing_keys_is_slowed_down(start: Start) -> None:
    client = start(PlainEngine, keys="required", requests_per_second=0.5, burst=3)
    statuses = [client.get("/v1/card", headers=bearer(f"vouch_{n}_x")).status_code for n in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    client = start(PlainEngine, keys="required", requests_per_second=0.5, burst=3)
    key, row = new_key("n", "read", 0)
    client.app.state.store.add_key(row)  # type: ignore[attr-defined]
    assert client.get("/v1/card", headers=bearer(key)).status_code == 200
    statuses = [client.get("/v1/card", headers=bearer(f"{key[:-5]}{n:05}")).status_code for n in range(4)]
    assert statuses == [401, 401, 429, 429]
    assert client.get("/v1/card", headers=bearer(key)).status_code == 200  # who has the key is not slowed down


def test_a_local_service_answers_to_local_names_only(start: Start) -> None:
    client = start(PlainEngine, hosts=())
    assert client.get("/healthz").status_code == 400  # it was asked for as testserver
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/healthz", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", ""):
        assert client.get("/v1/card", headers={"Host": host}).status_code == 400


def test_keys_are_asked_for_unless_only_this_machine_can_reach_the_service(start: Start) -> None:
    assert start(PlainEngine, host="0.0.0.0").get("/v1/card").status_code == 401
    assert start(PlainEngine, host="127.0.0.1").get("/v1/card").status_code == 200
    assert start(PlainEngine, host="0.0.0.0", keys="off").get("/v1/card").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/healthz"), ("GET", "/v1/card"), ("GET", "/v1/none"), ("POST", "/v1/recommend"), ("TRACE", "/v1/card"),
     ("GET", "/<script>alert(1)</script>"), ("PATCH", "/v1/recommend")],
)  # fmt: skip
def test_every_answer_has_the_security_headers(shared: TestClient, method: str, path: str) -> None:
    answer = shared.request(method, path)
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers[name] == value
    assert answer.headers["x-request-id"]
    assert answer.headers["cache-control"]
    assert "<script>" not in answer.text
    if answer.status_code >= 400:
        assert answer.headers["content-type"] == "application/json"
        assert set(answer.json()["error"]) == {"what", "where", "hint"}


def test_a_body_of_another_kind_is_refused(shared: TestClient) -> None:
    """Forms of other sites can send text/plain without asking first; JSON they cannot."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = shared.post("/v1/recommend", content=json.dumps(ASK), headers={"Content-Type": kind})
        assert answer.status_code in (415, 422)


# Logs ---------------------------------------------------------------------------------------------------------------

PRIVATE = ["secret-user", "secret-item", "secret-title", "secret-query", "secret-path", "secret-id", "testclient"]


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """What the service logs, as it is written."""
    written: list[dict[str, Any]] = []
    text = JsonLines()

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            written.append(json.loads(text.format(record)))

    handler, logger = Keep(), logging.getLogger("vouch.service")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_line_for_each_request_and_nothing_personal(
    secured: tuple[TestClient, dict[str, str]], lines: list[dict[str, Any]]
) -> None:
    client, keys = secured
    admin = bearer(keys["admin"])
    event = {"id": "secret-id", "user": "secret-user", "item": "secret-item"}
    client.post("/v1/recommend", json={"user": "secret-user", "history": ["secret-item"]}, headers=admin)
    client.post("/v1/recommend?user=secret-query", json={"user": ["secret-user"]}, headers=admin)
    client.post("/v1/explain", json={"user": "secret-user", "item": "secret-item"}, headers=admin)
    client.post("/v1/events", json={"events": [event]}, headers=admin)
    client.put("/v1/items", json={"items": [{"id": "secret-item", "title": "secret-title"}]}, headers=admin)
    client.get("/v1/items/secret-item", headers=admin)
    client.get("/secret-path", headers=admin)
    client.get("/v1/card", headers=bearer("vouch_secret-id_secret-query"))
    requests = [line for line in lines if line["event"] == "request"]
    assert [(line["method"], line["route"], line["status"]) for line in requests] == [
        ("POST", "/v1/recommend", 200),
        ("POST", "/v1/recommend", 422),
        ("POST", "/v1/explain", 404),
        ("POST", "/v1/events", 200),
        ("PUT", "/v1/items", 200),
        ("GET", "/v1/items/{item:path}", 200),
        ("GET", "none", 404),
        ("GET", "/v1/card", 401),
    ]
    assert requests[0]["key"] == keys["admin"].split("_")[1]
    text = json.dumps(lines)
    for private in [*PRIVATE, *keys.values()]:
        assert private not in text


def test_an_unforeseen_error_is_logged_by_its_place_and_told_by_its_id(
    start: Start, lines: list[dict[str, Any]]
) -> None:
    class Broken(PlainEngine):
        def card(self) -> dict[str, Any]:
            raise RuntimeError("about secret-user")

    answer = start(Broken).get("/v1/card")
    assert answer.status_code == 500
    (line,) = [line for line in lines if line["event"] == "failed"]
    assert line["error"] == "RuntimeError"
    assert "test_security.py" in line["frames"][-1]
    assert line["request"] in answer.json()["error"]["hint"]
    assert "secret-user" not in json.dumps(lines) + answer.text
