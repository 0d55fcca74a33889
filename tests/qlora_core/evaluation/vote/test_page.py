"""The page over HTTP: blind, signed, escaped, safe to send twice."""

import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.links import Grant, LinkSigner, Role
from qlora_core.evaluation.vote.page import MAX_BODY_BYTES, create_app
from qlora_core.evaluation.vote.records import vote_records

NAMES = ("zephyr", "wizard", "model_a", "model_b", "prompt_id", "gold", "repeat", "self")


class Browser:
    """A client with the links of one study."""

    def __init__(self, box: BallotBox, judge: list[Verdict] | None = None) -> None:
        self.box = box
        self.signer = LinkSigner("k" * 32, box.study_id)
        self.client = TestClient(create_app(box, self.signer, judge or []))
        self.responses: list[Any] = []

    def link(self, rater: str = "ann", role: Role = "rate", expires_in_s: int = 600) -> str:
        base = "r" if role == "rate" else "results"
        return f"/{base}/{self.signer.sign(Grant(role, rater, int(time.time()) + expires_in_s))}"

    def get(self, url: str) -> Any:
        self.responses.append(self.client.get(url))
        return self.responses[-1]

    def post(self, url: str, **body: object) -> Any:
        self.responses.append(self.client.post(url, json=body))
        return self.responses[-1]

    def act(self, link: str, act: str, **body: object) -> Any:
        return self.post(f"{link}/{act}", request_id=secrets.token_hex(16), **body)


@pytest.fixture
def browser(make_box: Callable[..., BallotBox]) -> Browser:
    return Browser(make_box(8, gold=2))


def records(browser: Browser) -> list:
    with browser.box.state() as state:
        return vote_records(state, browser.box.pairs)


def test_nothing_a_rater_receives_names_a_model_or_tells_a_check(browser: Browser) -> None:
    link = browser.link()
    browser.get(link)
    browser.get("/static/vote.js")
    browser.get("/static/vote.css")
    view = browser.post(f"{link}/next").json()
    browser.act(link, "skip", task=view["task"])
    browser.act(link, "undo")
    while view["task"]:
        view = browser.act(link, "vote", task=view["task"], choice="left").json()
    browser.act(link, "vote", task="0" * 20, choice="left")
    browser.post(f"{link}/vote", nonsense=1)
    browser.get("/nothing")
    assert {record.occasion for record in records(browser)} == {"rating", "gold", "repeat", "self"}
    for response in browser.responses:
        received = " ".join([str(response.url), response.text, *map(str, response.headers.items())]).casefold()
        if "/static/" in str(response.url):
            received = received.replace("'self'", "").replace("itself", "")
        for name in ("zephyr", "wizard", *(NAMES if "/static/" not in str(response.url) else ())):
            assert name not in received.replace("'self'", ""), (name, response.url)
    keys = {key for response in browser.responses if "/r/" in str(response.url) and response.text.startswith("{")
            for key in response.json()}  # fmt: skip
    assert keys == {"task", "done", "remaining", "can_undo", "prompt", "left", "right", "notice", "detail"}


def test_the_scan_would_find_a_name(browser: Browser) -> None:
    assert "zephyr" in browser.get(browser.link("", "results") + "/files/votes.csv").text or not records(browser)
    assert "zephyr" in browser.get(browser.link("", "results") + "/files/label-studio.json").text


@pytest.mark.parametrize("act", ["next", "vote", "skip", "undo"])
def test_forged_and_expired_links_open_nothing(browser: Browser, act: str) -> None:
    body = {"request_id": secrets.token_hex(16)}
    task = browser.post(f"{browser.link()}/next").json()["task"]
    if act in ("vote", "skip"):
        body["task"] = task
    if act == "vote":
        body["choice"] = "left"
    if act == "next":
        body = {}
    forged = f"/r/{LinkSigner('x' * 32, browser.box.study_id).sign(Grant('rate', 'ann', 2**40))}"
    expired, results = browser.link(expires_in_s=-1), browser.link("ann", "results").replace("/results/", "/r/")
    before = len(browser.box.journal.events_after(0))
    for link in (forged, expired, results, "/r/ann", browser.link() + "x"):
        assert browser.client.post(f"{link}/{act}", json=body).status_code == 403
        assert browser.client.get(link).status_code == 403
    assert len(browser.box.journal.events_after(0)) == before
    expected = 409 if act == "undo" else 200  # the same request with a link that is good: nothing to take back yet
    assert browser.client.post(f"{browser.link()}/{act}", json=body).status_code == expected


def test_every_write_needs_a_link(browser: Browser) -> None:
    paths = [route for route in browser.client.app.routes if "POST" in getattr(route, "methods", ())]  # type: ignore[attr-defined]
    assert len(paths) == 6
    assert all("{token}" in route.path for route in paths)
    for path in ("/vote", "/next", "/docs", "/openapi.json", "/r/", "/results/"):
        assert browser.client.post(path, json={}).status_code in (404, 405)


def test_a_raters_link_does_not_open_the_results(browser: Browser) -> None:
    token = browser.link().split("/")[-1]
    for url in (f"/results/{token}", f"/results/{token}/files/votes.csv"):
        assert browser.get(url).status_code == 403
    for act, body in (
        ("exclude", {"request_id": "r" * 16, "rater": "ann", "excluded": True}),
        ("invite", {"rater": "x"}),
    ):
        assert browser.post(f"/results/{token}/{act}", **body).status_code == 403
    assert browser.get(browser.link("", "results")).status_code == 200


def test_a_double_submit_counts_once_and_shows_the_same_next_pair(browser: Browser) -> None:
    link = browser.link()
    task = browser.post(f"{link}/next").json()["task"]
    body = {"request_id": secrets.token_hex(16), "task": task, "choice": "right", "note": "  terse "}
    first, second = (browser.post(f"{link}/vote", **body) for _ in range(2))
    assert first.json() == second.json() and first.status_code == second.status_code == 200
    assert [(record.choice, record.note) for record in records(browser)] == [("right", "terse")]
    other = browser.act(link, "vote", task=task, choice="left")
    assert other.status_code == 409 and "another tab" in other.json()["notice"]
    assert other.json()["task"] == first.json()["task"]


def test_what_was_on_the_left_is_what_is_recorded(browser: Browser) -> None:
    link = browser.link()
    view = browser.post(f"{link}/next").json()
    while view["task"]:
        left_is_zephyr = "by z" in view["left"]
        same = view["left"] == view["right"]
        view = browser.act(link, "vote", task=view["task"], choice="left").json()
        record = records(browser)[-1]
        winner = {"a": record.model_a, "b": record.model_b}[record.label]
        assert winner.startswith("zephyr") == left_is_zephyr
        assert same == (record.occasion == "self")


def test_answers_are_escaped(make_box: Callable[..., BallotBox], browser: Browser) -> None:
    attack = (
        "<script>alert(1)</script> <img src=x onerror=alert(1)> ![t](https://evil.test/p.png) "
        '[x](javascript:alert(1)) [y](data:text/html,hi) <a href="https://ok.test" onclick="x()">z</a>'
        "\n\n<iframe src=x>\n"
    )
    pair = browser.box.pairs["p3"].model_copy(update={"answer_a": attack, "answer_b": attack, "prompt": attack})
    browser.box.pairs.update(dict.fromkeys(browser.box.pairs, pair))
    view = browser.post(f"{browser.link()}/next").json()
    for part in ("prompt", "left", "right"):
        html = view[part]
        assert "&lt;script&gt;" in html and "&lt;img" in html
        for bad in ("<script", "<img", "<iframe", 'href="javascript', 'href="data', '<a href="https://ok'):
            assert bad not in html
    page = browser.get(browser.link("", "results"))
    assert "<script>alert" not in page.text


def test_every_answer_carries_the_headers_that_keep_scripts_and_frames_out(browser: Browser) -> None:
    for url in (browser.link(), "/static/vote.js", "/nothing", "/r/forged", browser.link("", "results")):
        headers = browser.get(url).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] == "no-store"
        assert "set-cookie" not in headers and "access-control-allow-origin" not in headers
    for url in (browser.link(), browser.link("", "results"), "/r/forged"):
        html = browser.get(url).text
        assert "<script>" not in html and "style=" not in html and " onclick" not in html


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "model-a"},
        {"choice": None},
        {"task": "x"},
        {"request_id": "short"},
        {"note": "n" * 2001},
        {"rater": "ben"},
    ],
)
def test_bodies_of_another_form_are_refused(browser: Browser, change: dict) -> None:
    link = browser.link()
    task = browser.post(f"{link}/next").json()["task"]
    body = {"request_id": secrets.token_hex(16), "task": task, "choice": "left"}
    assert browser.post(f"{link}/vote", **{**body, **change}).status_code == 422
    assert records(browser) == []
    assert browser.post(f"{link}/vote", **body).status_code == 200


def test_a_large_body_is_refused_before_it_is_read(browser: Browser) -> None:
    link = browser.link()
    large = b"x" * (MAX_BODY_BYTES + 1)
    assert browser.client.post(f"{link}/vote", content=large).status_code == 413
    assert browser.client.post(f"{link}/vote", content=iter([large])).status_code == 413  # chunked: no length


def test_results_show_quality_agreement_and_people_against_the_judge(make_box: Callable[..., BallotBox]) -> None:
    box = make_box(12, gold=2, raters_per_item=2)
    judge = [
        Verdict(
            prompt_id=pair.prompt_id, model_a=pair.model_a, model_b=pair.model_b, verdict="a", first=first, judge="j"
        )
        for pair in box.pairs.values()
        for first in ("a", "b")
    ]
    browser = Browser(box, judge)
    empty = browser.get(browser.link("", "results"))
    assert empty.status_code == 200 and "There are no votes yet." in empty.text
    for rater in ("ann", "ben"):
        view = browser.post(f"{browser.link(rater)}/next").json()
        while view["task"]:
            sides = ["by w" in view["left"], "by w" in view["right"]]
            best = "tie" if sides[0] == sides[1] else ("left" if sides[0] else "right")
            view = browser.act(browser.link(rater), "vote", task=view["task"], choice=best).json()
    page = browser.get(browser.link("", "results")).text
    for text in ("zephyr-alpha", "Cohen&#39;s kappa", "Krippendorff", "10 pairs compared", "10 of 10", "people: <b>"):
        assert text in page, text
    assert browser.act(browser.link("", "results"), "exclude", rater="ben", excluded=True).status_code == 200
    assert "0 of 10" in browser.get(browser.link("", "results")).text
    invited = browser.post(f"{browser.link('', 'results')}/invite", rater="eve").json()
    assert browser.post(f"/{invited['path']}/next").json()["task"]
    assert browser.post(f"{browser.link('', 'results')}/invite", rater="a b").status_code == 422


def test_the_owners_files_are_those_of_the_export(browser: Browser) -> None:
    link = browser.link()
    task = browser.post(f"{link}/next").json()["task"]
    browser.act(link, "vote", task=task, choice="tie")
    owner = browser.link("", "results")
    (row,) = [json.loads(line) for line in browser.get(f"{owner}/files/votes.jsonl").text.splitlines()]
    assert row["rater"] == "ann" and row["label"] == "tie"
    assert browser.get(f"{owner}/files/..%2Fsecret").status_code == 404
