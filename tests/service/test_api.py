"""The routes of /v1 over a real run."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from small_server import PlainEngine, wait_until

from vouch.recommenders.runs import open_run
from vouch.service import schemas
from vouch.service.engine import Engine

Start = Callable[..., TestClient]


def ask(client: TestClient, path: str, status: int = 200, **body: Any) -> Any:
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


def names(answer: Any) -> list[str]:
    return [each["item"] for each in answer.get("recommendations", answer.get("similar"))]


# Recommendations ----------------------------------------------------------------------------------------------------


def test_a_user_gets_what_the_model_recommends(shared: TestClient, run_folder: Path) -> None:
    run = open_run(run_folder)
    answer = ask(shared, "recommend", user="u1", k=5)
    assert names(answer) == [item for item, _ in _best(run, "u1", 5)]
    assert [each["score"] for each in answer["recommendations"]] == pytest.approx([s for _, s in _best(run, "u1", 5)])
    assert not answer["fallback"]
    assert answer["notes"] == answer["unknown"] == []
    assert answer["model"]["name"] == "best"
    first = answer["recommendations"][0]
    assert first["title"] == f"Item <b>{first['item'][1:]}</b>"
    assert first["attributes"]["brand"] == f"b{int(first['item'][1:]) % 5}"


def _best(run: Any, user: str, k: int) -> list[tuple[str, float]]:
    from vouch.data import Query

    found = run.model.recommend([Query(user=user)], k, log=run.dataset.interactions)
    return [(run.model.items.id(int(c)), float(s)) for c, s in zip(found.item[0], found.score[0], strict=True)]


def test_a_history_replaces_the_stored_one_and_unknown_items_are_named(shared: TestClient) -> None:
    log = ask(shared, "users/history", user="u1")["items"]
    own = ask(shared, "recommend", user="u1", k=4)
    same = ask(shared, "recommend", history=["never", *(each["item"] for each in log), "<b>", "never"], k=4)
    assert names(same) == names(own)
    assert same["unknown"] == ["never", "<b>"]
    other = ask(shared, "recommend", user="u1", history=["i0"], k=4)
    assert other["recommendations"] == ask(shared, "recommend", history=["i0"], k=4)["recommendations"]


@pytest.mark.parametrize("whose", [{"user": "stranger"}, {"history": []}, {"history": ["never"]}])
def test_who_is_not_known_gets_popular_items_and_is_told(shared: TestClient, whose: dict[str, Any]) -> None:
    answer = ask(shared, "recommend", **whose, k=3)
    assert answer["fallback"]
    assert len(answer["recommendations"]) == 3
    assert any("popular" in note for note in answer["notes"])


def test_k_beyond_the_catalogue_gives_all_there_are(shared: TestClient) -> None:
    answer = ask(shared, "recommend", history=["i0"], k=1_000)
    assert len(set(names(answer))) == 39
    assert any("fewer" in note for note in answer["notes"])


def test_repeat_and_exclude(shared: TestClient) -> None:
    assert "i0" not in names(ask(shared, "recommend", history=["i0"], k=40))
    assert "i0" in names(ask(shared, "recommend", history=["i0"], k=40, repeat=True))
    best = names(ask(shared, "recommend", history=["i0"], k=5))
    assert names(ask(shared, "recommend", history=["i0"], k=3, exclude=best[:2])) == best[2:]


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ([{"attribute": "brand", "equals": "b1"}], lambda n: n % 5 == 1),
        ([{"attribute": "brand", "in": ["b1", "b2"]}], lambda n: n % 5 in (1, 2)),
        ([{"attribute": "tags", "equals": "even"}], lambda n: n % 2 == 0),
        ([{"attribute": "price", "min": 10, "max": 20}], lambda n: 10 <= n <= 20 and n % 7),
        (
            [{"attribute": "price", "max": 9.5}, {"attribute": "tags", "in": ["odd"]}],
            lambda n: n < 9.5 and n % 2 and n % 7,
        ),
        ([{"attribute": "brand", "equals": "'; DROP TABLE items; --"}], lambda n: False),
    ],
)
def test_filters(shared: TestClient, filters: list[Any], kept: Callable[[int], bool]) -> None:
    found = names(ask(shared, "recommend", history=["never"], k=40, filters=filters))
    assert sorted(found) == sorted(f"i{n}" for n in range(40) if kept(n))
    similar = names(ask(shared, "similar", item="i0", k=40, filters=filters))
    assert set(similar) <= {f"i{n}" for n in range(1, 40) if kept(n)}


@pytest.mark.parametrize(
    ("field", "where"),
    [
        ({"filters": [{"attribute": "nothing", "equals": "x"}]}, "body.filters"),
        ({"filters": [{"attribute": "brand", "min": 3}]}, "body.filters"),
        ({"scenario": "nowhere"}, "body.scenario"),
        ({"domain": "none"}, "body.domain"),
    ],
)
def test_what_the_run_cannot_answer_is_told(shared: TestClient, field: dict[str, Any], where: str) -> None:
    error = ask(shared, "recommend", 422, user="u1", **field)["error"]
    assert error["where"] == where
    assert error["what"]


def test_a_request_at_fault_does_not_spoil_its_batch(start: Start) -> None:
    hold, passes = threading.Event(), []

    class Held(PlainEngine):
        def check(self, question: Any) -> None:
            if question.scenario:
                from vouch.errors import UnknownIdError

                raise UnknownIdError("there is no such scenario")

        def recommend(self, questions: Any) -> Any:
            passes.append(len(questions))
            assert len(passes) > 1 or hold.wait(20)
            return super().recommend(questions)

    client = start(Held)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.post, "/v1/recommend", json={"user": "a"})
        while not passes:
            time.sleep(0.01)
        bad = pool.submit(client.post, "/v1/recommend", json={"user": "a", "scenario": "x"})
        rest = [pool.submit(client.post, "/v1/recommend", json={"user": f"{n}", "k": n + 1}) for n in range(5)]
        while client.app.state.serving.waiting < 6:  # type: ignore[attr-defined]
            time.sleep(0.01)
        hold.set()
        assert bad.result().status_code == 422
        assert first.result().status_code == 200
        assert [len(each.result().json()["recommendations"]) for each in rest] == [1, 2, 3, 4, 5]
    assert passes == [1, 5]  # and those that waited were answered by one pass


def test_similar_items(shared: TestClient, run_folder: Path) -> None:
    answer = ask(shared, "similar", item="i3", k=4)
    model = open_run(run_folder).model
    assert [(each["item"], pytest.approx(each["score"])) for each in answer["similar"]] == model.similar("i3", 4)
    assert answer["item"]["title"] == "Item <b>3</b>"
    assert ask(shared, "similar", 404, item="never")["error"]["where"] == "body.item"


def test_reasons_are_those_of_removal(shared: TestClient) -> None:
    history = [each["item"] for each in ask(shared, "users/history", user="u2")["items"]]
    answer = ask(shared, "recommend", user="u2", k=2, reasons=3)
    for each in answer["recommendations"]:
        told = ask(shared, "explain", user="u2", item=each["item"], n=3)
        assert told["reasons"] == each["reasons"]
        assert told["evidence"]["kind"] == "similarity"
        assert [reason["drop"] for reason in each["reasons"]] == sorted(
            (r["drop"] for r in each["reasons"]), reverse=True
        )
        assert {reason["item"] for reason in each["reasons"]} <= set(history)
    assert ask(shared, "explain", user="stranger", item="i0")["reasons"] == []
    ask(shared, "explain", 404, user="u2", item="never")


# Events -------------------------------------------------------------------------------------------------------------


def test_the_next_recommendation_reflects_an_event(client: TestClient) -> None:
    assert ask(client, "recommend", user="new")["fallback"]
    sent = [{"id": "1", "user": "new", "item": "i4"}, {"id": "2", "user": "new", "item": "i9"}]
    assert ask(client, "events", events=sent) == {"accepted": 2, "duplicates": 0, "unknown": []}
    answer = ask(client, "recommend", user="new", k=6)
    assert names(answer) == names(ask(client, "recommend", history=["i4", "i9"], k=6))
    assert not answer["fallback"]
    before = ask(client, "users/history", user="u1")["items"]
    ask(client, "events", events=[{"id": "3", "user": "u1", "item": "i4"}])
    after = ask(client, "users/history", user="u1")["items"]
    assert [each["item"] for each in after] == [each["item"] for each in before] + ["i4"]
    joined = ask(client, "recommend", history=[each["item"] for each in after], k=6)
    assert names(ask(client, "recommend", user="u1", k=6)) == names(joined)


def test_an_event_sent_again_changes_nothing(client: TestClient) -> None:
    event = {"id": "e", "user": "new", "item": "i4", "kind": "buy", "time": 10, "value": 2.5}
    assert ask(client, "events", events=[event])["accepted"] == 1
    assert ask(client, "events", events=[event, {**event, "item": "i5"}]) == {
        "accepted": 0,
        "duplicates": 2,
        "unknown": [],
    }
    assert [each["item"] for each in ask(client, "users/history", user="new")["items"]] == ["i4"]


def test_events_of_items_the_model_does_not_know_are_kept_and_named(client: TestClient) -> None:
    sent = [{"id": "1", "user": "new", "item": "tomorrow"}, {"id": "2", "user": "new", "item": "i4"}]
    assert ask(client, "events", events=sent)["unknown"] == ["tomorrow"]
    assert names(ask(client, "recommend", user="new", k=6)) == names(ask(client, "recommend", history=["i4"], k=6))


def test_feedback_likes_and_hides(client: TestClient) -> None:
    best = names(ask(client, "recommend", user="u1", k=3))
    assert ask(client, "feedback", id="f1", user="u1", item=best[0], kind="dislike") == {"accepted": True}
    assert ask(client, "feedback", id="f1", user="u1", item=best[0], kind="dislike") == {"accepted": False}
    assert names(ask(client, "recommend", user="u1", k=2)) == best[1:]
    assert best[0] not in names(ask(client, "recommend", user="u1", history=["i0"], k=40))
    assert ask(client, "users/history", user="u1")["hidden"] == [best[0]]
    ask(client, "feedback", id="f2", user="u1", item=best[1], kind="like")
    assert ask(client, "users/history", user="u1")["items"][-1]["item"] == best[1]
    assert ask(client, "users/erase", user="u1") == {"events": 1, "feedback": 2}
    assert names(ask(client, "recommend", user="u1", k=3)) == best


# Catalogue ----------------------------------------------------------------------------------------------------------


def test_a_deleted_item_is_in_no_answer_until_it_comes_back(client: TestClient) -> None:
    best = names(ask(client, "recommend", user="u1", k=3))
    assert client.delete(f"/v1/items/{best[0]}").json() == {"deleted": True}
    assert client.delete(f"/v1/items/{best[0]}").json() == {"deleted": False}
    assert client.get(f"/v1/items/{best[0]}").json()["deleted"]
    assert names(ask(client, "recommend", user="u1", k=2)) == best[1:]
    assert best[0] not in names(ask(client, "similar", item=best[1], k=40))
    price = [{"attribute": "price", "min": 0}]
    assert best[0] not in names(ask(client, "recommend", user="u1", k=40, filters=price))
    ask(client, "similar", 404, item=best[0])
    assert client.put("/v1/items", json={"items": [{"id": best[0]}]}).json()["stored"] == 1
    assert names(ask(client, "recommend", user="u1", k=3)) == best


def test_changed_attributes_are_shown_and_filtered_by(client: TestClient) -> None:
    change = {
        "id": "i3",
        "title": "Better",
        "attributes": {"price": 1000, "brand": None, "tags": ["odd", "sale"], "new": True},
    }
    assert client.put("/v1/items", json={"items": [change]}).json() == {"stored": 1, "not_recommendable": []}
    item = client.get("/v1/items/i3").json()
    assert item["title"] == "Better"
    assert item["attributes"] == {"price": 1000, "tags": ["odd", "sale"], "new": True}

    def kept(*filters: Any) -> list[str]:
        return names(ask(client, "recommend", history=["never"], k=40, filters=list(filters)))

    assert kept({"attribute": "price", "min": 500}) == ["i3"]
    assert kept({"attribute": "tags", "equals": "sale"}) == ["i3"]
    assert kept({"attribute": "title", "equals": "Better"}) == ["i3"]
    assert kept({"attribute": "title", "equals": "Item <b>3</b>"}) == []
    assert kept({"attribute": "title", "equals": "Item <b>4</b>"}) == ["i4"]
    assert kept({"attribute": "new", "equals": True}) == ["i3"]
    assert kept({"attribute": "new", "equals": "True"}) == []
    assert "i3" not in kept({"attribute": "brand", "in": ["b0", "b1", "b2", "b3", "b4"]})
    client.put("/v1/items", json={"items": [{"id": "i3", "attributes": {"brand": "b3"}}]})
    assert "i3" in kept({"attribute": "brand", "equals": "b3"})
    assert kept({"attribute": "price", "min": 500}) == ["i3"]  # what was not named kept its value


def test_an_item_the_model_was_not_trained_on_cannot_be_recommended_and_says_so(client: TestClient) -> None:
    answer = client.put("/v1/items", json={"items": [{"id": "brand new/ü", "title": "N"}, {"id": "i1"}]}).json()
    assert answer == {"stored": 2, "not_recommendable": ["brand new/ü"]}
    item = client.get(f"/v1/items/{quote('brand new/ü', safe='')}").json()
    assert (item["item"], item["title"], item["recommendable"]) == ("brand new/ü", "N", False)
    assert "brand new/ü" not in names(ask(client, "recommend", history=["i0"], k=100))
    assert "trained" in ask(client, "similar", 422, item="brand new/ü")["error"]["what"]
    assert "trained" in ask(client, "explain", 422, user="u1", item="brand new/ü")["error"]["what"]
    assert client.delete(f"/v1/items/{quote('brand new/ü', safe='')}").json() == {"deleted": True}


def test_what_was_changed_outlives_the_service(start: Start) -> None:
    first = start()
    best = names(ask(first, "recommend", user="u1", k=2))
    first.delete(f"/v1/items/{best[0]}")
    ask(first, "feedback", id="f", user="u1", item=best[1], kind="dislike")
    assert not set(best) & set(names(ask(start(), "recommend", user="u1", k=40)))


def test_pictures_are_served_from_the_catalogue_only(shared: TestClient) -> None:
    item = shared.get("/v1/items/i1").json()
    answer = shared.get(item["picture"])
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "image/png"
    assert answer.content.startswith(b"\x89PNG")
    assert shared.get("/v1/items/i2").json()["picture"] is None  # its file would lie outside
    for path in ("i2", "never", quote("../../best/run.json", safe=""), "..%2f..%2fbest%2frun.json"):
        assert shared.get(f"/v1/pictures/{path}").status_code == 404


# The model ----------------------------------------------------------------------------------------------------------


def test_the_card_and_its_audits(client: TestClient) -> None:
    card = client.get("/v1/card").json()
    assert card["card"]["data"]["users"] == 60
    assert card["card"]["model"]["method"] == "itemknn"
    assert card["audits"] == {}
    audit = {"summary": "<b>none</b>", "result": {"auc": 0.5, "details": [1, None, {"x": "y"}]}}
    assert client.put("/v1/audits/attack", json=audit).json() == audit
    told = client.get("/v1/card").json()["audits"]["attack"]
    assert {name: told[name] for name in audit} == audit
    assert client.put("/v1/audits/other", json=audit).status_code == 422


def test_another_run_is_swapped_in_without_dropping_a_request(start: Start, runs: Path) -> None:
    (runs / "next").mkdir()
    client, stop, statuses, models = start(PlainEngine), threading.Event(), [], []

    def keep_asking() -> None:
        while not stop.is_set():
            answer = client.post("/v1/recommend", json={"user": "known", "k": 3})
            statuses.append(answer.status_code)
            models.append(answer.json()["model"]["name"])

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            pool.submit(keep_asking)
        for name in ("next", "best", "next"):
            time.sleep(0.1)
            answer = client.put("/v1/model", json={"run": name})
            assert answer.json()["model"]["name"] == name
            assert ask(client, "recommend", user="known")["model"]["name"] == name  # from now on
        stop.set()
    assert set(statuses) == {200}
    assert set(models) == {"best", "next"}


@pytest.mark.parametrize("name", ["none", "broken", "service.db"])
def test_a_run_that_cannot_be_served_leaves_the_old_one(start: Start, runs: Path, name: str) -> None:
    (runs / "broken").mkdir()
    (runs / "broken" / "broken").touch()
    client = start(PlainEngine)
    error = client.put("/v1/model", json={"run": name})
    assert error.status_code == 422
    assert str(runs) not in error.text
    assert ask(client, "recommend", user="known")["model"]["name"] == "best"


@pytest.mark.parametrize("name", ["..", "../best", "/etc", "a/b", "", ".hidden", "x\x00"])
def test_only_a_run_beside_the_one_served_can_be_named(shared: TestClient, name: str) -> None:
    assert shared.put("/v1/model", json={"run": name}).status_code == 422


def test_other_workers_follow_what_was_changed_through_one(start: Start, runs: Path) -> None:
    (runs / "next").mkdir()
    one, other = (start(PlainEngine, poll_seconds=0.05) for _ in range(2))
    one.delete("/v1/items/i2")
    one.put("/v1/model", json={"run": "next"})
    until = time.monotonic() + 10
    while time.monotonic() < until:
        answer = ask(other, "recommend", user="known", k=30)
        if answer["model"]["name"] == "next" and "i2" not in names(answer):
            break
        time.sleep(0.02)
    else:
        pytest.fail("the other worker did not follow")
    again = start(PlainEngine)  # and so does one that starts later
    assert ask(again, "recommend", user="known")["model"]["name"] == "next"


def test_a_swap_holds_for_the_run_it_was_made_for(start: Start, runs: Path) -> None:
    def served(name: str = "best") -> str:
        return ask(start(PlainEngine, run=runs / name), "recommend", user="known")["model"]["name"]

    (runs / "next").mkdir()
    (runs / "third").mkdir()
    start(PlainEngine).put("/v1/model", json={"run": "next"})
    assert served() == "next"
    assert served("third") == "third"  # naming another run ends it
    assert served() == "best"
    start(PlainEngine).put("/v1/model", json={"run": "next"})
    (runs / "next").rmdir()  # gone in the meantime: the run named at the start is served
    assert served() == "best"


def test_a_run_trained_anew_in_its_place_is_opened_again_by_all_workers(start: Start, runs: Path) -> None:
    opened: list[str] = []

    class Counted(PlainEngine):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened.append(path.name)

    one, _ = (start(Counted, poll_seconds=0.05) for _ in range(2))
    assert opened == ["best"] * 2
    one.put("/v1/model", json={"run": "best"})
    wait_until(lambda: len(opened) == 4)
    time.sleep(0.3)
    assert opened == ["best"] * 4  # and then no more


# Probes and description ---------------------------------------------------------------------------------------------


def test_health_readiness_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["model"]["name"] == "best"
    ask(client, "recommend", user="u1")
    ask(client, "recommend", 422, user=1)
    client.get("/v1/items/never")
    ask(client, "events", events=[{"id": "1", "user": "u", "item": "i"}])
    text = client.get("/metrics").text
    for line in (
        'vouch_requests_total{route="/v1/recommend",status="200"} 1.0',
        'vouch_requests_total{route="/v1/recommend",status="422"} 1.0',
        'vouch_requests_total{route="/v1/items/{item:path}",status="404"} 1.0',
        'vouch_request_seconds_count{route="/v1/recommend"} 2.0',
        "vouch_batch_size_sum 1.0",
        "vouch_events_total 1.0",
        "vouch_waiting 0.0",
    ):
        assert line in text


def test_the_description_covers_every_route_and_its_errors(shared: TestClient) -> None:
    described = shared.get("/v1/openapi.json").json()
    for path, methods in described["paths"].items():
        for operation in methods.values():
            assert operation.get("description") or operation.get("summary"), path
            if path.startswith("/v1"):
                assert {"401", "422", "429", "503"} <= set(operation["responses"])
    for name, schema in described["components"]["schemas"].items():
        if name.endswith("Request"):
            assert schema["additionalProperties"] is False
    for kind in (schemas.RecommendRequest, schemas.EventsRequest, schemas.ItemsRequest, schemas.FeedbackRequest):
        for example in kind.model_config["json_schema_extra"]["examples"]:  # type: ignore[index,call-overload]
            kind.model_validate(example)


def test_the_engine_keeps_the_contract(run_folder: Path) -> None:
    from vouch.service.contract import Answers

    engine: Answers = Engine.open(run_folder)  # mypy checks the signatures
    for name in (each for each in vars(Answers) if not each.startswith("_")):
        assert hasattr(engine, name)
        assert hasattr(PlainEngine, name) or hasattr(PlainEngine(run_folder), name)
    json.dumps(engine.card(), allow_nan=False)
