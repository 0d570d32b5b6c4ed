"""The pages without a browser: what they say, what they refuse, and that nothing typed gets through unescaped."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from small_runs import small_data, small_run

from vouch.claims import read_ledger
from vouch.compare import compare
from vouch.data.world import WorldConfig, build
from vouch.errors import ConfigError
from vouch.service import schemas
from vouch.service.app import create_app
from vouch.service.config import ServiceConfig
from vouch.service.pages import assets, board, groups, routes
from vouch.service.storage import Store, Unavailable
from vouch.systems import SYSTEMS

HERE = {"Origin": "http://testserver"}
PART = {"HX-Request": "true", "HX-Target": "window"}
EVIL = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)//<svg/onload=alert(1)>",
)
FORM = "application/x-www-form-urlencoded"
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "line", "circle", "path", "rect"}


class Seen(HTMLParser):
    """A page in parts: its elements with their attributes, its text, and whether elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("script", "style"):
            assert not data.strip(), "there is a script or a style in the page"

    def all(self, tag: str, **wanted: str) -> list[dict[str, str]]:
        names = {name.rstrip("_").replace("_", "-"): value for name, value in wanted.items()}
        return [a for t, a in self.elements if t == tag and all(a.get(n) == v for n, v in names.items())]

    def links(self) -> list[str]:
        return [each.get("href", "") for each in self.all("a")]


def seen(response: Any, status: int = 200) -> Seen:
    """The page that was answered, after checks that every page must pass."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "script-src 'self';" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    page = Seen(response.text)
    for tag, attributes in page.elements:
        assert tag not in ("style", "iframe", "object", "embed", "base"), tag
        assert tag != "script" or attributes["src"].startswith("/static/")
        assert "style" not in attributes
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("href", "src", "action", "hx-get"):
            at = attributes.get(name, "/")
            assert at.startswith(("/", "#", "https://arxiv.org/abs/")) and not at.startswith("//"), at
    return page


def cards(page: Seen) -> list[str]:
    """The items recommended, by the hidden fields that carry them on."""
    return [each["value"] for each in page.all("input", name="seen")]


@pytest.fixture(scope="module")
def shared(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    database = f"sqlite:///{tmp_path_factory.mktemp('pages') / 'service.db'}"
    config = ServiceConfig(run=run_folder, database=database, hosts=("testserver",), requests_per_second=0)
    with TestClient(create_app(config), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def site(shared: TestClient) -> TestClient:
    """A service for visitors who only look; it is shared by the tests."""
    shared.cookies.clear()
    return shared


@pytest.fixture
def shop(client: TestClient) -> TestClient:
    client.headers.update(HERE)
    return client


# All pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/shop", "/compare", "/claims", "/claims/apr", "/claims/pcgan", "/card", "/sign-in", "/items/i3"]
)
def test_each_page_is_whole(site: TestClient, path: str) -> None:
    page = seen(site.get(path))
    assert len(page.all("h1")) == 1 and page.all("html", lang="en") and page.all("main", id="main")
    assert page.all("a", class_="skip")[0]["href"] == "#main"
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {each.get("for") for each in page.all("label")}
    for tag in ("input", "select"):
        for each in page.all(tag):
            assert each.get("type") == "hidden" or each.get("id") in labelled, each
    assert all("alt" in each for each in page.all("img"))
    current = page.all("a", aria_current="page")
    assert len(current) == (1 if path.split("/")[1] in ("shop", "compare", "claims", "card") else 0)


def test_home_leads_to_the_shop_window(site: TestClient) -> None:
    assert site.get("/", follow_redirects=False).headers["location"] == "/shop"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/items/nobody", 404), ("/claims/nothing", 404), ("/compare?report=../..", 404), ("/compare/data?report=x", 404),
        ("/compare/report?report=..%2F..%2Fetc", 404), ("/shop?below=cheap", 422), ("/shop?below=nan", 422),
        ("/shop?with=", 422), ("/shop?with=a%00b", 422), ("/shop?" + "&".join(["with=i1"] * 31), 422),
        ("/shop?q=" + "x" * 201, 422), ("/shop/why?with=i1", 422), ("/shop/why?with=i1&item=nobody", 404),
        ("/pictures/i3", 404), ("/static/nothing.js", 404), ("/static/..%2F..%2Froutes.py", 404),
    ],
)  # fmt: skip
def test_what_does_not_work_is_told_on_a_page(site: TestClient, path: str, status: int) -> None:
    response = site.get(path)
    if response.headers["content-type"].startswith("text/html"):
        page = seen(response, status)
        assert "That did not work" in page.text
    else:  # a path that no page has
        assert response.status_code == status


@pytest.mark.parametrize("evil", EVIL)
def test_nothing_typed_is_shown_unescaped(shop: TestClient, runs: Path, evil: str) -> None:
    """Every field of every page; `seen` fails on any element or attribute that was typed."""
    code = quote(evil, safe="")
    plain = seen(shop.get("/shop"))
    window = seen(shop.get(f"/shop?q={code}&label={code}&with={code}&without={code}&seen={code}"))
    assert f"Found for “{evil.strip()}”" in window.text
    assert len(window.all("script")) == len(plain.all("script"))
    for path in (
        f"/shop?below={code}", f"/shop/why?with=i1&item={code}", f"/items/{code}", f"/claims/{code}",
        f"/claims?q={code}&verdict={code}&area={code}", f"/compare?report={code}", f"/sign-in?next={code}", f"/{code}",
    ):  # fmt: skip
        response = shop.get(path)
        if response.headers["content-type"].startswith("text/html"):
            page = seen(response, response.status_code)
            assert not page.all("svg", onload="alert(1)") and not page.all("img", src="x")
        assert response.status_code in (200, 404, 422)
    seen(shop.post("/sign-in", data={"key": evil, "next": evil}))
    seen(shop.post("/shop/feedback", data={"item": evil, "kind": evil}), 422)

    shop.post("/shop/user", data={"user": evil})
    assert f"User {evil}" in seen(shop.get("/shop/user")).text
    shop.post("/shop/feedback", data={"item": "i3", "kind": "like"})
    put = {"id": "i3", "title": evil, "attributes": {"brand": evil, "price": 3.0, "extra": evil}}
    assert shop.put("/v1/items", json={"items": [put]}).status_code == 200
    assert evil in seen(shop.get("/items/i3")).text
    assert evil in seen(shop.get("/shop/user")).text
    assert evil in seen(shop.get("/shop?with=i3")).text
    assert shop.put("/v1/audits/attack", json={"summary": evil, "result": {"found": evil}}).status_code == 200
    assert evil in seen(shop.get("/card")).text
    write_comparison(runs / "compare", name=evil)
    assert seen(shop.get("/compare")).text.count(evil) >= 4


def test_a_ledger_is_not_trusted_either(site: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(each for each in read_ledger() if each.slug == "remi")
    for name in ("metric", "data", "command", "commit", "baseline_name", "method_name", "effect_is", "date"):
        object.__setattr__(entry, name, EVIL[0])
    monkeypatch.setattr(board, "ledger", lambda: [entry])
    assert seen(site.get("/claims/remi")).text.count(EVIL[0]) >= 7
    assert EVIL[0] in seen(site.get("/claims")).text


# The shop window ----------------------------------------------------------------------------------------------------


def test_items_clicked_together_change_what_is_recommended(site: TestClient) -> None:
    empty = seen(site.get("/shop"))
    assert "Popular with everybody" in empty.text and len(cards(empty)) == 12
    first = cards(empty)[0]
    add = next(each for each in empty.links() if each == f"/shop?with={first}")

    one = seen(site.get(add))
    assert "Recommended for this history" in one.text and first not in cards(one)
    answer = site.post("/v1/recommend", json={"history": [first], "k": 12, "reasons": 2}).json()
    assert cards(one) == [each["item"] for each in answer["recommendations"]]
    assert f"because of Item <b>{first[1:]}</b>" in " ".join(one.text.split())

    second = cards(one)[0]
    both = seen(site.get(f"/shop?with={first}&with={second}"))
    assert {first, second}.isdisjoint(cards(both))
    assert f"/shop?with={second}" in both.links() and f"/shop?with={first}" in both.links()  # each can be taken out

    refused = cards(one)[1]
    hide = next(each for each in one.links() if each.endswith(f"without={refused}"))
    without = seen(site.get(hide))
    assert refused not in cards(without) and f"/shop?with={first}" in without.links()


def test_the_part_that_changes_comes_alone_and_says_what_is_new(site: TestClient) -> None:
    before = cards(seen(site.get("/shop?with=i3")))
    asked = "&".join(f"seen={item}" for item in before)
    response = site.get(f"/shop?with=i3&with=i25&{asked}", headers=PART)
    part = seen(response)
    assert not part.all("html") and not part.all("h1")
    assert response.headers["hx-push-url"] == "/shop?with=i3&with=i25"  # without what was seen
    assert "HX-Request" in response.headers["vary"]
    after = cards(part)
    new = len(set(after) - set(before))
    assert 0 < new < 12 and len(part.all("li", class_="card new")) == new
    assert f"12 recommendations, {new} of them new." in part.text
    assert part.all("div", hx_swap_oob="innerHTML:#status")


def test_items_can_be_searched_and_narrowed_down(site: TestClient) -> None:
    page = seen(site.get("/shop?q=ITEM <b>1"))
    found = [each for each in page.links() if each.startswith("/shop?with=")]
    assert {"/shop?with=i1", "/shop?with=i12"} <= set(found)
    assert "/shop?with=i7" in seen(site.get("/shop?q=i7")).links()  # by id
    assert "No item has that in its title" in seen(site.get("/shop?q=nothing like it")).text
    below = seen(site.get("/shop?below=9&with=i3"))
    prices = [site.get(f"/v1/items/{item}").json()["attributes"]["price"] for item in cards(below)]
    assert prices and max(prices) <= 9
    assert all("below=9" in each for each in below.links() if each.startswith("/shop?with=i3&"))


def test_deleted_items_are_found_nowhere(shop: TestClient) -> None:
    assert shop.delete("/v1/items/i7").status_code == 200
    assert "/shop?with=i7" not in seen(shop.get("/shop?q=i7")).links()
    seen(shop.get("/items/i7"), 404)
    shop.post("/shop/user", data={"user": "u1"})
    seen(shop.post("/shop/feedback", data={"item": "i7", "kind": "like"}), 404)


def test_feedback_of_a_user_is_stored_and_changes_what_is_recommended(shop: TestClient) -> None:
    assert shop.get("/shop/user", follow_redirects=False).headers["location"] == "/shop"  # nobody is chosen
    seen(shop.post("/shop/feedback", data={"item": "i3", "kind": "like"}), 409)
    sent = shop.post("/shop/user", data={"user": "u1"}, follow_redirects=False)
    assert sent.headers["location"] == "/shop/user" and "u1" not in sent.headers["location"]
    kept = sent.headers["set-cookie"].lower()
    assert "httponly" in kept and "samesite=strict" in kept and "path=/shop" in kept
    before = cards(seen(shop.get("/shop/user")))
    answer = shop.post("/v1/recommend", json={"user": "u1", "k": 12}).json()
    assert before == [each["item"] for each in answer["recommendations"]]

    liked, refused = before[0], before[1]
    after = cards(seen(shop.post("/shop/feedback", data={"item": liked, "kind": "like"})))
    assert liked not in after
    assert shop.post("/v1/users/history", json={"user": "u1"}).json()["items"][-1]["item"] == liked

    part = shop.post("/shop/feedback", data={"item": refused, "kind": "dislike", "seen": after}, headers=PART)
    assert part.headers["hx-push-url"] == "/shop/user"
    page = seen(part)
    assert refused not in cards(page) and "is hidden from now on." in page.text
    assert shop.post("/v1/users/history", json={"user": "u1"}).json()["hidden"] == [refused]

    page = seen(shop.post("/shop/forget"))
    assert cards(page) == before


def test_a_user_who_is_not_known_gets_popular_items_and_is_told_so(shop: TestClient) -> None:
    page = seen(shop.post("/shop/user", data={"user": "zoë"}))
    assert "User zoë" in page.text and "not in the log" in page.text and "Popular with everybody" in page.text
    page = seen(shop.post("/shop/feedback", data={"item": "i3", "kind": "like"}))
    assert "Recommended for user zoë" in page.text


@pytest.mark.parametrize("origin", [None, "null", "http://elsewhere.example", "http://testserver.elsewhere.example"])
def test_forms_of_other_sites_are_refused(site: TestClient, origin: str | None) -> None:
    headers = {"Origin": origin} if origin else {}
    for path, fields in (
        ("/shop/user", {"user": "u1"}), ("/shop/feedback", {"item": "i3", "kind": "like"}), ("/shop/forget", {}),
        ("/card/measure", {}), ("/sign-in", {"key": "k"}), ("/sign-out", {}),
    ):  # fmt: skip
        page = seen(site.post(path, data=fields, headers=headers), 403)
        assert "not sent from a page of this service" in page.text
    assert site.app.state.store.count_events() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"item=i3&kind=love", FORM, 422), (b"kind=like", FORM, 422),
        (b"item=%ff&kind=like", FORM, 400), (b"\xff=1", FORM, 400),
        (b"&".join(b"seen=%d" % n for n in range(200)), FORM, 400),
        (b'{"item": "i3", "kind": "like"}', "application/json", 415), (b"item=i3%00&kind=like", FORM, 422),
    ],
)  # fmt: skip
def test_forms_that_do_not_fit_are_refused(site: TestClient, body: bytes, kind: str, status: int) -> None:
    site.post("/shop/user", data={"user": "u1"}, headers=HERE)
    seen(site.post("/shop/feedback", content=body, headers={**HERE, "Content-Type": kind}), status)
    assert site.app.state.store.count_events() == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", ["", "%00", "%ff", "x" * 300, "a%0ab"])
def test_a_broken_cookie_is_nobody(site: TestClient, value: str) -> None:
    response = site.get("/shop/user", headers={"Cookie": f"vouch_shopper={value}"}, follow_redirects=False)
    assert response.status_code == 303 and response.headers["location"] == "/shop"


def test_reasons_are_those_of_the_api(site: TestClient) -> None:
    history = ["i3", "i9", "i14"]
    asked = "&".join(f"with={item}" for item in history)
    item = cards(seen(site.get(f"/shop?{asked}")))[0]
    found = site.post("/v1/explain", json={"history": history, "item": item, "n": 5}).json()
    assert found["reasons"]
    page = seen(site.get(f"/shop/why?{asked}&item={item}"))
    part = seen(site.get(f"/shop/why?{asked}&item={item}", headers={"HX-Request": "true", "HX-Target": "why-1"}))
    assert page.all("h1") and not part.all("h1")
    for shown in (page, part):
        for reason in found["reasons"]:
            assert reason["title"] in shown.text and f"−{reason['drop']:.2f}" in shown.text  # noqa: RUF001
        assert found["evidence"]["about"] in shown.text
    assert [each["width"] for each in part.all("rect")][:2] == ["100", "100.0"]  # the strongest is the whole line


def test_an_error_in_a_part_is_a_notice(site: TestClient) -> None:
    response = site.get("/shop?below=cheap", headers=PART)
    page = seen(response, 422)
    assert not page.all("html") and "cheap" in page.text


def test_without_the_database_items_clicked_together_still_work(
    shop: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> Any:
        raise Unavailable("the database is gone", where="/a/secret/path", hint="ask again in a moment")

    shop.post("/shop/user", data={"user": "u1"})
    monkeypatch.setattr(Store, "past", gone)
    assert cards(seen(shop.get("/shop?with=i3")))
    page = seen(shop.get("/shop/user"), 503)
    assert "the database is gone" in page.text.lower() and "secret" not in page.text


def test_pictures_and_their_stand_ins(site: TestClient) -> None:
    page = seen(site.get("/shop"))
    pictured = {each["src"] for each in page.all("img")} - {assets.url("vouch.svg")}
    assert pictured and all(each.startswith("/v1/pictures/i") for each in pictured)
    tiles = [each for each in page.all("span") if each.get("class", "").startswith("tile")]
    assert len(tiles) + len(pictured) == 12
    assert site.get(next(iter(pictured))).headers["content-type"] == "image/png"


def test_the_goods_of_the_embedded_world_are_drawn(start: Any, tmp_path: Path, runs: Path) -> None:
    world = build(WorldConfig(users=60, items=60, events=900))
    small_run(runs / "world", "itemknn", world.dataset)
    client = start(run=runs / "world")
    page = seen(client.get("/shop"))
    pictured = [each["src"] for each in page.all("img") if each["src"].startswith("/pictures/")]
    assert len(pictured) == 12
    drawn = client.get(pictured[0])
    assert drawn.headers["content-type"] == "image/png" and drawn.content.startswith(b"\x89PNG")
    assert "Only category" in page.text and "Price up to" in page.text
    mugs = seen(client.get("/shop?label=mug"))
    assert {client.get(f"/v1/items/{item}").json()["attributes"]["category"] for item in cards(mugs)} == {"mug"}
    assert len(page.all("button", name="user")) == 3


def test_an_item_page_shows_what_is_known_and_what_is_similar(client: TestClient) -> None:
    page = seen(client.get("/items/i3"))
    assert "Item <b>3</b>" in page.text and "3.00" in page.text and "/shop?with=i3" in page.links()
    similar = client.post("/v1/similar", json={"item": "i3", "k": 8}).json()["similar"]
    assert [f"/items/{each['item']}" for each in similar] == [
        each for each in page.links() if each.startswith("/items/")
    ]
    assert client.put("/v1/items", json={"items": [{"id": "new/one", "title": "New"}]}).status_code == 200
    assert "added after the model was trained" in seen(client.get("/items/new%2Fone")).text


# Evidence -----------------------------------------------------------------------------------------------------------


def write_comparison(folder: Path, *, name: str = "Best of all") -> dict[str, Any]:
    def row(slug: str, title: str, value: float, against: Any) -> dict[str, Any]:
        return {
            "method": slug, "name": title, "status": "ok", "seeds": 2, "trials": 2, "against_best": against,
            "metrics": {"NDCG@10": value, "Coverage@10": 0.5}, "intervals": {"NDCG@10": [value - 0.01, value + 0.01]},
            "cost": {"fit_seconds": 1.5, "latency_p50_ms": 0.25, "parameters": 12345.0}, "config": {"decay": 0.5, "kind": name},
            "per_seed": [{"NDCG@10": value, "Coverage@10": 0.5}] * 2,
        }  # fmt: skip

    against = {"effect": -0.1, "interval": [-0.12, -0.08], "p_value": 0.0021, "significant": True}
    made = {
        "format": 1, "headline": "NDCG@10", "warnings": [f"mind {name}"], "command": f"vouch compare {name}",
        "verdict": {"best": "ease", "sentence": f"Yes: {name} is best.", "really_better": True, "tied": [], "against": {}},
        "methods": [
            row("ease", name, 0.2345, None),
            row("popularity", "Popularity", 0.1345, against),
            {"method": "bpr", "name": "BPR-MF", "status": "failed", "error": f"no memory for {name}"},
        ],
        "split": {"data": "small", "protocol": "leave-one-out", "train_rows": 1234, "test_cases": 60},
        "plan": {"methods": ["ease", "popularity", "bpr"], "seeds": 2, "trials": 2, "metrics": ["NDCG@10", "Coverage@10"]},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(made))
    return made


def test_without_a_comparison_the_way_to_one_is_told(site: TestClient) -> None:
    assert "vouch compare --data" in seen(site.get("/compare")).text


def test_the_comparison_beside_the_run_is_shown(client: TestClient, runs: Path) -> None:
    made = write_comparison(runs / "compare")
    (runs / "compare" / "report.html").write_text("<style>p{}</style><script>1</script>")
    page = seen(client.get("/compare"))
    text = " ".join(page.text.split())
    for wanted in (
        "Yes: Best of all is best.",
        "0.2345",
        "0.2245 to 0.2445",
        "0.1345",
        "0.002",
        "12,345",
        "failed: no memory",
    ):
        assert wanted in text, wanted
    assert page.all("link", id="plotly.js-style-global")[0]["class"] == "no-inline-styles"
    data = client.get(page.all("div", id="plots")[0]["data-source"]).json()
    assert [each["slug"] for each in data["methods"]] == ["ease", "popularity"]
    assert data["methods"][0]["metrics"] == made["methods"][0]["metrics"]
    assert data["metrics"] == ["NDCG@10", "Coverage@10"] and set(data["costs"]) == {
        "fit_seconds",
        "latency_p50_ms",
        "parameters",
    }
    report = client.get(next(each for each in page.links() if each.startswith("/compare/report")))
    assert (
        report.headers["content-security-policy"] == routes.REPORT_POLICY and "script-src" not in routes.REPORT_POLICY
    )


def test_a_real_comparison_is_shown_by_groups_too(client: TestClient, runs: Path) -> None:
    result = compare(small_data(), ["popularity", "itemknn"], out=runs / "compare", seeds=1, trials=1, jobs=1)
    page = seen(client.get("/compare"))
    assert result.verdict.sentence in page.text
    data = client.get("/compare/data").json()
    assert [group["by"] for group in data["groups"]] == ["events in the history", "training events of the target"]
    for group in data["groups"]:
        assert sum(group["cases"]) == result.split["test_cases"]
        for row in data["methods"]:  # the groups' means, weighted, are the whole's
            mean = np.average(group["means"][row["slug"]], weights=group["cases"])
            assert mean == pytest.approx(row["metrics"]["NDCG@10"])
        assert f"NDCG@10 by {group['by']}" in page.text

    unit = next((runs / "compare" / "units").glob("itemknn-*-seed-*.npz"))
    unit.write_bytes(b"damaged")
    groups._unit.cache_clear()
    again = runs / "compare" / "comparison.json"
    again.write_text(again.read_text())  # another time of writing
    assert client.get("/compare/data").json()["groups"] == []
    assert "by events in the history" not in seen(client.get("/compare")).text


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(None, 5, "up to 4"), (5, 10, "5 to 9"), (5, 6, "5"), (1000, None, "1,000 or more"), (None, None, "all")],
)
def test_ranges_in_words(low: Any, high: Any, words: str) -> None:
    assert groups.span(low, high) == words


def test_of_several_comparisons_one_can_be_chosen(client: TestClient, runs: Path) -> None:
    write_comparison(runs / "a", name="Method of a")
    write_comparison(runs / "b", name="Method of b")
    for name in ("a", "b"):
        page = seen(client.get(f"/compare?report={name}"))
        assert f"Method of {name}" in page.text
        assert {each.get("selected") for each in page.all("option")} >= {""}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 1, "methods": []}'])
def test_a_damaged_comparison_is_told(client: TestClient, runs: Path, content: str) -> None:
    (runs / "compare").mkdir()
    (runs / "compare" / "comparison.json").write_text(content)
    page = seen(client.get("/compare"), 500)
    assert "comparison" in page.text and str(runs) not in page.text


def test_the_board_lists_every_system_with_the_ledgers_verdicts(site: TestClient) -> None:
    page = seen(site.get("/claims"))
    assert [f"/claims/{system.slug}" for system in SYSTEMS] == [
        each for each in page.links() if each.startswith("/claims/")
    ]
    rows, trouble = board.board()
    assert not trouble and len(rows) == 46
    newest = {(entry.slug, entry.variant): entry for entry in read_ledger() if entry.scale == "desk"}
    for row in rows:
        for stand in row.stands:
            entry = newest.get((row.system.slug, stand.variant))
            assert stand.verdict == (entry.verdict if entry else board.OPEN)
            if entry is not None:
                assert stand.entry == entry
    stands = [stand.verdict for row in rows for stand in row.stands]
    bare = sum(not row.stands for row in rows)
    for verdict, count in board.counts(rows):
        # every claim counts: one that does not hold must not hide behind the main claim of its system
        assert count == (bare if verdict == board.MISSING else stands.count(verdict))
        assert f"{count} {verdict}" in " ".join(page.text.split())
        listed = [
            each
            for each in seen(site.get("/claims", params={"verdict": verdict})).links()
            if each.startswith("/claims/")
        ]
        assert listed == [f"/claims/{row.system.slug}" for row in rows if verdict in row.verdicts]


def test_the_board_can_be_searched(site: TestClient) -> None:
    part = seen(
        site.get("/claims?q=REMI&area=recommenders/sequential", headers={"HX-Request": "true", "HX-Target": "board"})
    )
    assert not part.all("html") and "1 of 46 systems." in part.text
    assert [each for each in part.links() if each.startswith("/claims/")] == ["/claims/remi"]
    assert "No system fits" in seen(site.get("/claims?q=nothingofthekind")).text


def test_a_claim_shows_our_number_beside_the_papers(site: TestClient) -> None:
    row = board.one("remi")
    entry = row.stands[0].entry
    assert entry is not None and row.stands[0].earlier
    page = seen(site.get("/claims/remi"))
    for wanted in (
        entry.statement, entry.reported, entry.command, entry.data, entry.date, entry.verdict, f"{entry.baseline:.4f}",
        f"{entry.method:.4f}", f"{entry.effect:+.4f}", f"[{entry.interval[0]:+.4f}, {entry.interval[1]:+.4f}]",
    ):  # fmt: skip
        assert wanted in page.text, wanted
    assert "https://arxiv.org/abs/2302.14532" in page.links()


def test_a_ledger_that_cannot_be_read_is_told(site: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ConfigError("line 3 is no entry", where="/a/secret/path")

    monkeypatch.setattr(board, "ledger", broken)
    page = seen(site.get("/claims"))
    assert "line 3 is no entry" in page.text and "secret" not in page.text
    assert len([each for each in page.links() if each.startswith("/claims/")]) == 46


def test_the_run_card_measures_on_request_and_shows_audits(shop: TestClient) -> None:
    page = seen(shop.get("/card"))
    text = " ".join(page.text.split())
    assert "Not measured on the test part yet" in text and text.count("not run yet") >= 3
    for slot in ("attack", "privacy", "explanation"):
        assert f"/v1/audits/{slot}" in text
    assert "small" in text and "0.1000" in text  # the data, and the validation metric of the run

    page = seen(shop.post("/card/measure"))
    test = shop.get("/v1/card").json()["card"]["metrics"]["test"]
    for name, each in test["metrics"].items():
        assert (
            name in page.text
            and f"{each['value']:.4f}" in page.text
            and f"{each['low']:.4f} to {each['high']:.4f}" in page.text
        )
    assert "by history length" in page.text and "by popularity of the target" in page.text
    cases = sum(int(row["cases"]) for row in test["groups"]["history length"])
    assert cases == test["cases"]

    shop.put(
        "/v1/audits/privacy", json={"summary": "members cannot be told", "result": {"auc": 0.513, "members": 1200}}
    )
    page = seen(shop.get("/card"))
    assert "members cannot be told" in page.text and "0.513" in page.text and "1,200" in page.text
    assert "/v1/audits/privacy" not in page.text and "/v1/audits/attack" in page.text


# Keys ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(start: Any) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """A service that asks for keys, and a key of each role."""
    import time

    from vouch.service.security import new_key

    client = start(keys="required")
    made = {}
    for role in ("read", "write", "admin"):
        made[role], row = new_key(role, role, time.time())  # type: ignore[arg-type]
        client.app.state.store.add_key(row)
    client.headers.update(HERE)
    yield client, made


def test_a_visitor_without_a_key_is_asked_for_one(guarded: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = guarded
    for path in ("/shop", "/compare", "/claims", "/claims/apr", "/card", "/items/i3"):
        asked = client.get(path, follow_redirects=False)
        assert asked.status_code == 303 and asked.headers["location"] == f"/sign-in?next={quote(path, safe='')}"
    for path in ("/shop/user", "/shop/feedback", "/shop/forget", "/card/measure"):
        assert client.post(path, data={"user": "u1", "item": "i3", "kind": "like"}).status_code == 401
    assert client.get("/compare/data", follow_redirects=False).status_code == 303
    assert client.get("/pictures/i3", follow_redirects=False).status_code == 303
    assert client.get(assets.url("vouch.css")).status_code == 200

    wrong = seen(client.post("/sign-in", data={"key": keys["read"][:-1] + "!", "next": "/card"}), 401)
    assert client.app.state.serving.served.model.fingerprint not in wrong.text  # type: ignore[attr-defined]
    assert "not known here" in wrong.text and not wrong.all("input", value=keys["read"])
    right = client.post("/sign-in", data={"key": keys["read"], "next": "/card"}, follow_redirects=False)
    assert right.status_code == 303 and right.headers["location"] == "/card"
    kept = right.headers["set-cookie"].lower()
    assert "httponly" in kept and "samesite=strict" in kept
    page = seen(client.get("/card"))
    assert page.all("form", action="/sign-out") and not page.all("form", action="/card/measure")
    assert client.get("/v1/pictures/i1").status_code == 200  # by the cookie
    client.post("/sign-out")
    assert client.get("/card", follow_redirects=False).status_code == 303


def test_a_reader_may_look_and_no_more(guarded: tuple[TestClient, dict[str, str]]) -> None:
    client, keys = guarded
    client.post("/sign-in", data={"key": keys["read"]})
    page = seen(client.post("/shop/user", data={"user": "u1"}))
    assert not page.all("form", action="/shop/feedback") and not page.all("form", action="/shop/forget")
    seen(client.post("/shop/feedback", data={"item": "i3", "kind": "like"}), 403)
    seen(client.post("/shop/forget"), 403)
    seen(client.post("/card/measure"), 403)
    client.post("/sign-in", data={"key": keys["write"]})
    assert seen(client.get("/shop/user")).all("form", action="/shop/feedback")
    seen(client.post("/shop/feedback", data={"item": "i3", "kind": "like"}))
    seen(client.post("/shop/forget"), 403)


@pytest.mark.parametrize(
    "next", ["//elsewhere.example", "https://elsewhere.example", "/\\elsewhere.example", "javascript:1", "/\r\nX: 1"]
)
def test_signing_in_leads_to_our_own_pages_only(guarded: tuple[TestClient, dict[str, str]], next: str) -> None:
    client, keys = guarded
    sent = client.post("/sign-in", data={"key": keys["read"], "next": next}, follow_redirects=False)
    assert sent.status_code == 303 and sent.headers["location"] == "/"


def test_keys_cannot_be_tried_without_end(start: Any) -> None:
    client = start(keys="required", requests_per_second=0.001, burst=3)
    tries = [client.post("/sign-in", data={"key": "vouch_a_b"}, headers=HERE).status_code for _ in range(5)]
    assert tries == [401, 401, 401, 429, 429]


# Scripts and styles -------------------------------------------------------------------------------------------------


def test_scripts_come_from_here_and_are_kept(site: TestClient) -> None:
    page = seen(site.get("/shop"))
    for at in [*(each["src"] for each in page.all("script")), *(each["href"] for each in page.all("link"))]:
        got = site.get(at)
        assert got.status_code == 200 and "immutable" in got.headers["cache-control"]
        name = at.partition("?")[0].rpartition("/")[2]
        assert got.content == assets.files()[name].read_bytes()
    plotly = site.get(assets.url("plotly.min.js"), headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plotly.headers and plotly.headers["content-type"].startswith("text/javascript")
    with site.stream("GET", assets.url("plotly.min.js"), headers={"Accept-Encoding": "gzip"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert len(raw) < len(plotly.content) / 2 and gzip.decompress(raw) == plotly.content


def contrast(one: str, other: str) -> float:
    """The contrast of two colours by WCAG, from 1 to 21."""

    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_the_colours_have_contrast_enough() -> None:
    """Text 4.5 to 1 and edges of fields 3 to 1 (WCAG AA), in light and in dark."""
    css = (assets.OWN / "vouch.css").read_text()
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = [
        dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    grounds = ("paper", "sheet", "wash")
    texts = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in grounds]
    texts += [("on-accent", "accent"), ("good", "good-wash"), ("bad", "bad-wash"), ("open", "open-wash")]
    for colours in schemes:
        for ink, ground in texts:
            assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)
        for ground in grounds:
            assert contrast(colours["edge"], colours[ground]) >= 3, ground
    tints = re.findall(r"\.tint-\d \{ background: (#\w{6}); color: (#\w{6});", css)
    assert len(tints) == 12 and all(contrast(*tint) >= 4.5 for tint in tints)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assets.files.cache_clear()
    monkeypatch.setitem(assets.FROM_PACKAGES, "htmx.min.js", ("no_such_package_at_all", "htmx.min.js"))
    with pytest.raises(ConfigError) as caught:
        routes.router()
    assert 'pip install "vouch[service]"' in str(caught.value)
    assets.files.cache_clear()


def test_the_description_of_the_api_holds_no_pages(site: TestClient) -> None:
    paths = site.get("/v1/openapi.json").json()["paths"]
    assert not [path for path in paths if path.startswith(("/shop", "/claims", "/card", "/static", "/sign"))]


def test_no_user_and_no_item_gets_into_the_log(shop: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        shop.post("/shop/user", data={"user": "a very private user"})
        shop.get("/shop/user")
        shop.post("/shop/feedback", data={"item": "i17", "kind": "like"})
        shop.get("/shop?with=i17&q=secretwish")
    told = " ".join(
        f"{record.getMessage()} {getattr(record, 'facts', '')}"
        for record in caplog.records
        if record.name.startswith("vouch")
    )
    assert told and "private" not in told and "i17" not in told and "secretwish" not in told


def test_the_run_can_be_swapped_under_the_pages(shop: TestClient, runs: Path) -> None:
    shutil.copytree(runs / "best", runs / "other")
    assert shop.put("/v1/model", json={"run": "other"}).status_code == 200
    assert "Serving other" in " ".join(seen(shop.get("/shop")).text.split())


def test_recommend_request_is_what_the_window_asks(client: TestClient) -> None:
    """The window's bounds lie within the API's."""
    from vouch.service.pages import shop as window

    assert window.MOST_CLICKED <= schemas.MAX_HISTORY and window.SHOWN <= schemas.MAX_REASONED and window.REASONS <= 5
