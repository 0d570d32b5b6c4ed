"""What the service says of a body or a field it cannot take: in plain words, with the place and what to do."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "what", "where", "hint"),
    [
        ("{bad", JSON, "the body is not valid JSON: expecting property name", "body, character 1", "one JSON object"),
        ('{"user": "u1"', JSON, "the body is not valid JSON: expecting ','", "body, character 13", "one JSON object"),
        ("", JSON, "the body is missing", "body", "one JSON object"),
        ("", {}, "the body is missing", "body", "one JSON object"),
        ("null", JSON, "the body is missing", "body", "one JSON object"),
        ("[1]", JSON, "the body is no JSON object", "body", "one JSON object"),
        ('"text"', JSON, "the body is no JSON object", "body", "one JSON object"),
        (
            '{"user": "u1"}',
            {},
            "the body is not declared as JSON",
            "header.content-type",
            "Content-Type: application/json",
        ),
        (
            '{"user": "u1"}',
            {"Content-Type": "application/x-www-form-urlencoded"},  # what curl -d sends
            "the body is not declared as JSON",
            "header.content-type",
            "Content-Type: application/json",
        ),
        ("{}", JSON, "give a user or a history", "body", None),
        ('{"user": 17}', JSON, "input should be a valid string", "body.user", "in quotes"),
        ('{"user": "u1", "k": 0, "x": 1}', JSON, "input should be greater", "body.k", "there is one more fault"),
    ],
)
def test_a_bad_body_is_refused_in_plain_words(
    shared: TestClient, body: str, headers: dict[str, str], what: str, where: str, hint: str | None
) -> None:
    answer = shared.post("/v1/recommend", content=body, headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == 422
    assert error["what"].startswith(what) and "jSON" not in error["what"]
    assert error["where"] == where
    assert error["hint"] is None if hint is None else hint in error["hint"]


def test_a_browser_gets_a_page_where_there_is_none(shared: TestClient) -> None:
    shown = shared.get("/shopp", headers={"Accept": "text/html,*/*"})
    assert shown.status_code == 404
    assert "<h1>" in shown.text and "There is no such page" in shown.text
    assert "script-src 'self'" in shown.headers["content-security-policy"]
    for path, accept in (("/shopp", "*/*"), ("/v1/shopp", "text/html")):
        assert shared.get(path, headers={"Accept": accept}).json()["error"]["what"] == "there is no such page"


def test_a_head_is_answered_as_a_get(shared: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/v1/card", "/shop"):
        assert shared.head(path).status_code == 200
    assert shared.head("/v1/recommend").status_code == 405


def test_an_explanation_without_a_history_says_so(shared: TestClient) -> None:
    def notes(history: list[str]) -> list[str]:
        return shared.post("/v1/explain", json={"item": "i3", "history": history}).json()["notes"]

    assert notes([]) == notes(["nothing known"]) == ["there is no history that the recommendation could rest on"]
    assert notes(["i1"]) == []


def test_too_few_items_are_explained(shared: TestClient) -> None:
    body = {"user": "u1", "k": 5, "filters": [{"attribute": "brand", "equals": "none has it"}]}
    answer = shared.post("/v1/recommend", json=body).json()
    assert answer["recommendations"] == [] and "no others pass the filters" in answer["notes"][0]


def test_a_page_names_the_field(shared: TestClient) -> None:
    text = shared.get("/shop?q=" + "x" * 300).text
    assert "q: string should have at most 200 characters" in text.lower()
