"""The vote page in a real browser: keyboard alone, a phone, two raters at once, a killed server, hostile answers."""

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page

from qlora_core.evaluation.vote.ballots import BallotBox
from qlora_core.evaluation.vote.records import VoteRecord, vote_records

pytestmark = pytest.mark.browser

MODELS = ("zephyr-alpha", "wizard-beta")
NO_CHECKS = ("--repeat-share", "0", "--self-share", "0")
ATTACK = "<script>document.title = 'stolen'</script><img src=x onerror=\"document.title='stolen'\">"


def rows(count: int, **changes: object) -> list[dict]:
    return [
        {
            "prompt_id": f"p{n}",
            "prompt": f"Question {n}: how do *rainbows* form?",
            "model_a": MODELS[0],
            "answer_a": f"Good {n}. Light **bends** twice.\n\n- in\n- out\n",
            "model_b": MODELS[1],
            "answer_b": f"Poor {n}. " + "It is magic. " * (60 if n % 2 else 3),
            **changes,
        }
        for n in range(count)
    ]


def ready(page: Page, done: int) -> None:
    """Wait until `done` decisions are counted and the page takes the next."""
    page.wait_for_selector(f'body[data-done="{done}"][aria-busy="false"]')


def press(page: Page, key: str, done: int) -> None:
    page.keyboard.press(key)
    ready(page, done)


def better(page: Page) -> str:
    return "ArrowLeft" if page.inner_text("#left").startswith("Good") else "ArrowRight"


def records(study: Path) -> list[VoteRecord]:
    box = BallotBox(study)
    with box.state() as state:
        return vote_records(state, box.pairs)


def test_a_full_session_by_keyboard_alone(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(6), "--rater", "ann", "--repeat-share", "0.2", "--self-share", "0.2")
    page = open_page(served.said["url"])
    received: list[str] = []
    page.on("response", lambda response: received.append(response.url + str(response.headers)))
    ready(page, 0)
    total = int(page.inner_text("#progress-text").split()[-1])
    assert total == 8  # six pairs, one repeat, one self-pair
    page.keyboard.press("?")
    assert page.is_visible("#help")
    page.keyboard.press("t")  # no vote while the keys are explained
    page.keyboard.press("Escape")
    assert page.is_hidden("#help") and page.get_attribute("body", "data-done") == "0"
    press(page, "t", 1)
    press(page, "u", 0)  # the first pair again
    press(page, better(page), 1)
    press(page, "s", 2)
    press(page, "u", 1)
    page.keyboard.press("n")
    page.keyboard.type("both true, ub")  # letters of a note are no commands
    page.keyboard.press("Escape")
    press(page, "b", 2)
    done = 2
    while page.is_visible("#pair"):
        assert not any(name in page.content() for name in MODELS)
        same = page.inner_html("#left") == page.inner_html("#right")
        done += 1
        press(page, "t" if same else better(page), done)
    assert done == total and page.is_visible("#done")
    assert not any(name in text for name in MODELS for text in received) and received
    votes = records(served.study)
    assert Counter(vote.occasion for vote in votes) == {"rating": 6, "repeat": 1, "self": 1}
    noted = [vote for vote in votes if vote.note]
    assert [(vote.note, vote.label) for vote in noted] == [("both true, ub", "both_bad")]
    assert {vote.label for vote in votes if vote not in noted and vote.occasion != "self"} == {"a"}


def test_two_raters_at_once_lose_and_double_nothing(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(5), "--rater", "ann", "--rater", "ben", "--raters-per-item", "2", *NO_CHECKS)
    pages = {name: open_page(link) for name, link in served.said["links"].items()}
    for page in pages.values():
        ready(page, 0)
    for done in range(1, 6):
        for page in pages.values():  # both sent before either is answered, each twice
            page.evaluate("() => { choose('tie'); choose('left'); }")
        for page in pages.values():
            ready(page, done)
    assert all(page.is_visible("#done") for page in pages.values())
    votes = records(served.study)
    assert Counter((vote.rater, vote.item_id) for vote in votes) == {
        (name, f"p{n}"): 1 for name in ("ann", "ben") for n in range(5)
    }
    assert {vote.choice for vote in votes} == {"tie"}


def test_a_killed_server_and_a_reload_lose_nothing(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(5), "--rater", "ann", *NO_CHECKS)
    page = open_page(served.said["url"])
    ready(page, 0)
    press(page, better(page), 1)
    shown = page.inner_text("#pair")
    page.reload()
    ready(page, 1)
    assert page.inner_text("#pair") == shown
    served.kill()
    page.keyboard.press(better(page))
    page.wait_for_selector("text=The server does not answer")
    restart = threading.Thread(target=served.start)
    restart.start()
    ready(page, 2)  # the choice made while the server was away was kept and sent
    restart.join()
    assert page.is_hidden("#notice")
    page.reload()
    ready(page, 2)
    assert [vote.label for vote in records(served.study)] == ["a", "a"]


def test_a_choice_whose_answer_was_lost_is_sent_again_after_a_reload(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(4), "--rater", "ann", *NO_CHECKS)
    page = open_page(served.said["url"])
    ready(page, 0)
    page.route("**/vote", lambda route: (route.fetch(), route.abort()))  # stored, but the browser never hears of it
    page.keyboard.press(better(page))
    page.wait_for_selector("text=The server does not answer")
    page.unroute("**/vote")
    page.reload()
    ready(page, 1)
    assert [vote.label for vote in records(served.study)] == ["a"]


def test_two_tabs_of_one_rater_count_one_vote(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(4), "--rater", "ann", *NO_CHECKS)
    first, second = open_page(served.said["url"]), open_page(served.said["url"])
    ready(first, 0)
    ready(second, 0)
    assert first.inner_text("#pair") == second.inner_text("#pair")
    press(first, "t", 1)
    press(second, "b", 1)
    assert "another tab" in second.inner_text("#notice")
    assert second.inner_text("#pair") == first.inner_text("#pair")
    assert [vote.choice for vote in records(served.study)] == ["tie"]


def test_hostile_answers_run_nothing(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(2, answer_a=ATTACK, prompt=ATTACK), "--rater", "ann", *NO_CHECKS)
    page = open_page(served.said["url"])
    ready(page, 0)
    assert "<script>" in page.inner_text("#prompt")
    assert page.locator("#pair img, #pair script").count() == 0
    assert page.title() == "Which answer is better?"


def test_a_phone_votes_by_touch(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(3), "--rater", "ann", *NO_CHECKS)
    page = open_page(served.said["url"], phone=True)
    ready(page, 0)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for button in page.locator("#bar button:visible").all():
        box = button.bounding_box()
        assert box is not None and box["height"] >= 40 and box["x"] + box["width"] <= 390
        assert box["y"] + box["height"] <= 780  # within thumb's reach, however long the answers are
    page.tap('[data-choice="both_bad"]')
    ready(page, 1)
    page.tap("#undo")
    ready(page, 0)
    page.tap('[data-choice="left"]' if better(page) == "ArrowLeft" else '[data-choice="right"]')
    ready(page, 1)
    page.tap("#skip")
    ready(page, 2)
    assert [vote.label for vote in records(served.study)] == ["a", None]


def test_the_owner_excludes_a_rater_and_invites_another(serve: Callable, open_page: Callable) -> None:
    served = serve(rows(2), "--rater", "ann", *NO_CHECKS)
    page = open_page(served.said["url"])
    ready(page, 0)
    press(page, "t", 1)
    owner = open_page(served.said["results"])
    owner.click("text=Exclude")
    owner.wait_for_selector("text=Include")
    owner.wait_for_selector("#files a[href]")  # the reloaded page's script has run: its form is taken over
    owner.fill("#invite input", "ben")
    owner.keyboard.press("Enter")
    owner.wait_for_selector("#invitation:has-text('/r/')")
    ben = open_page(owner.inner_text("#invitation"))
    ready(ben, 0)
    assert ben.inner_text("#progress-text") == "0 of 2"
    page.reload()
    page.wait_for_selector("#done:visible")
