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


def test_a_page_names_the_field(shared: TestClient) -> None:
    text = shared.get("/shop?q=" + "x" * 300).text
    assert "q: string should have at most 200 characters" in text.lower()
