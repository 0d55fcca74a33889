"""Tournaments that are played: over the endpoint of the tests, through the library and through `qlora tournament`."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import AnswerBook, Prompt, read_answer_book
from qlora_core.evaluation.judge.checks import LongestWins
from qlora_core.evaluation.tournament_play import check_replaceable, most_verdicts, play_tournament
from qlora_core.evaluation.verdict import Verdict, read_verdicts, write_verdicts

if TYPE_CHECKING:
    from conftest import JudgeServer

STRENGTHS = {"base": 0, "champion": 10, "challenger": 24, "other": 12}
PROMPTS = 60


def quality(model: str, prompt: int) -> int:
    """A fixed quality with a fixed scatter: who is better on a prompt is known, and not always the stronger one."""
    digest = hashlib.sha256(f"{model} {prompt}".encode()).hexdigest()
    return STRENGTHS[model] + int(digest[:4], 16) % 40


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    for model in STRENGTHS:
        rows = [
            {"prompt_id": f"p{n:02d}", "question": f"question {n}", "category": "ab"[n % 2],
             "answer": f"quality {quality(model, n)} by hand {len(model)}.{n}"}
            for n in range(PROMPTS)
        ]  # fmt: skip
        (tmp_path / f"{model}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"{model}={tmp_path / f'{model}.jsonl'}" for model in STRENGTHS]


def config(folder: Path, judge: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(f"data: {{sources: [data]}}\nbase: {{model: demo}}\nevaluate:\n  judge: {judge}\n")
    return path


def endpoint(server: "JudgeServer", **settings: Any) -> str:
    chosen = {
        "kind": "openai", "model": "judge-1", "base_url": server.url, "input_usd_per_million": 2.0,
        "output_usd_per_million": 8.0, "budget_usd": 100.0, "timeout_s": 30.0, **settings,
    }  # fmt: skip
    return json.dumps(chosen)


def command(verdicts: Path, path: Path, sources: list[str], *more: str) -> list[str]:
    return ["tournament", str(verdicts), "--judge", str(path), *(f"--answers={source}" for source in sources), *more]


def run(capfd: pytest.CaptureFixture[str], arguments: list[str], code: int = 0) -> dict[str, Any]:
    capfd.readouterr()
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == code, result.output
    (line,) = capfd.readouterr().out.splitlines()
    return json.loads(line)


def test_tournament_settles_a_leader_with_both_orders_and_a_report(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    page = tmp_path / "page.html"
    path = config(tmp_path, endpoint(judge_server))
    found = run(capfd, command(tmp_path / "v.jsonl", path, sources, "--report", str(page)))
    assert {"ratings", "intervals", "matches", "unscored", "order_effect"} <= set(found)
    played = found["played"]
    assert (played["leader"], played["settled"], played["ended"]) == ("challenger", True, "settled")
    assert next(iter(found["ratings"])) == "challenger"
    rows = read_verdicts(tmp_path / "v.jsonl")
    assert len(rows) == played["verdicts"] == found["matches"]
    for row in rows:
        number = int(row.prompt_id[1:])
        a, b = quality(row.model_a, number), quality(row.model_b, number)
        assert row.verdict == ("a" if a > b else "b" if b > a else "tie")
    orders = {(row.prompt_id, row.model_a, row.model_b): set() for row in rows}
    for row in rows:
        orders[row.prompt_id, row.model_a, row.model_b].add(row.first)
    assert all(first == {"a", "b"} for first in orders.values())
    # What the server counts is what is told, and far from everything was asked
    assert played["judge"]["cost_usd"] == pytest.approx(judge_server.billed_usd, abs=1e-9)
    assert played["judge"]["certified"] is False
    assert judge_server.billed == len(rows) < most_verdicts(read_answer_book(sources)) / 2
    html = page.read_text()
    assert found["report"] == str(page)
    assert "challenger leads 4 models" in html
    assert "by hand" in html


def test_tournament_again_asks_nothing_and_writes_the_same(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    arguments = command(tmp_path / "v.jsonl", config(tmp_path, endpoint(judge_server)), sources)
    first = run(capfd, arguments)
    written, asked = (tmp_path / "v.jsonl").read_bytes(), judge_server.billed
    (tmp_path / "v.jsonl").unlink()
    again = run(capfd, arguments)
    assert judge_server.billed == asked
    assert (tmp_path / "v.jsonl").read_bytes() == written
    assert again == first


def test_killed_tournament_goes_on_and_pays_for_nothing_twice(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    judge_server.delay_s = 0.05
    in_flight = 4
    path = config(tmp_path, endpoint(judge_server, calls_in_flight=in_flight))
    arguments = command(tmp_path / "v.jsonl", path, sources)
    environment = {**os.environ, "OPENAI_API_KEY": ""}
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "qlora"), *arguments],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while judge_server.billed < 30 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert judge_server.billed >= 30
    assert not (tmp_path / "v.jsonl").exists()
    time.sleep(0.3)  # what was in flight is billed all the same
    judge_server.delay_s = 0.0
    found = run(capfd, arguments)
    assert found["played"]["leader"] == "challenger"
    rows = len(read_verdicts(tmp_path / "v.jsonl"))
    assert rows <= judge_server.billed <= rows + in_flight
    # A tournament that nobody killed gives the same rows
    other = tmp_path / "other"
    other.mkdir()
    run(capfd, command(other / "v.jsonl", config(other, endpoint(judge_server, calls_in_flight=in_flight)), sources))
    assert (other / "v.jsonl").read_bytes() == (tmp_path / "v.jsonl").read_bytes()


def test_budget_is_one_for_all_rounds_and_ends_the_tournament(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    call_usd = (1000 * 2 + 100 * 8) / 1e6
    path = config(tmp_path, endpoint(judge_server, budget_usd=45 * call_usd, calls_in_flight=4))
    found = run(capfd, command(tmp_path / "v.jsonl", path, sources))
    assert (found["played"]["ended"], found["played"]["settled"]) == ("budget", False)
    assert 45 * call_usd <= judge_server.billed_usd + 1e-9 <= 46 * call_usd + 1e-9
    assert found["matches"] == judge_server.billed
    assert found["unscored"] > 0
    assert found["played"]["judge"]["cost_usd"] == pytest.approx(judge_server.billed_usd, abs=1e-9)


def test_an_outage_is_no_result_and_what_was_paid_for_is_kept(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    judge_server.fault = lambda prompt, attempt: "500" if judge_server.billed >= 20 else None
    path = config(tmp_path, endpoint(judge_server, max_retries=0))
    arguments = command(tmp_path / "v.jsonl", path, sources)
    assert run(capfd, arguments, code=1)["error"]["type"] == "JudgeUnavailableError"
    assert not (tmp_path / "v.jsonl").exists()
    judge_server.fault = lambda prompt, attempt: None
    found = run(capfd, arguments)
    assert found["matches"] == judge_server.billed  # the twenty of before are among them


def test_adaptive_choice_asks_less_than_round_robin_for_the_same_leader(
    tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    asked = {}
    book = read_answer_book(sources)
    for adaptive in (True, False):
        found = play_tournament(_ByQuality(), book, lambda amount: None, adaptive=adaptive)
        assert found.standing is not None
        assert (found.standing.leader, found.ended) == ("challenger", "settled")
        asked[adaptive] = found.calls
    assert asked[True] < asked[False]
    assert judge_server.billed == 0


class _ByQuality(LongestWins):
    """The server's own rule, without a server."""

    def decide(self, questions: Any, advance: Any) -> list[Any]:
        from qlora_core.evaluation.pairwise import Judgement

        marks = [[int(text.split()[1]) for text in (q.first_answer, q.second_answer)] for q in questions]
        return [Judgement("first" if a > b else "second" if b > a else "tie") for a, b in marks]


def test_checks_of_a_config_judge_a_tournament(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str]
) -> None:
    (tmp_path / "checks.jsonl").write_text(
        json.dumps({"check": {"kind": "regex", "pattern": r"quality [3-9]\d"}}) + "\n"
    )
    path = config(tmp_path, "{kind: checks, checks: checks.jsonl}")
    found = run(capfd, command(tmp_path / "v.jsonl", path, sources))
    judge = found["played"]["judge"]
    assert (judge["kind"], judge["certified"], judge["cost_usd"]) == ("checks", False, 0.0)
    assert next(iter(found["ratings"])) == "challenger"
    assert {row.judge for row in read_verdicts(tmp_path / "v.jsonl")} == {"offline:checks"}


def test_verdicts_of_another_judge_are_not_overwritten(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    row = {"prompt_id": "p", "model_a": "base", "model_b": "other", "verdict": "a", "first": "a", "judge": "human:ann"}
    write_verdicts(tmp_path / "v.jsonl", [Verdict.model_validate(row)])
    before = (tmp_path / "v.jsonl").read_bytes()
    path = config(tmp_path, endpoint(judge_server))
    message = run(capfd, command(tmp_path / "v.jsonl", path, sources), code=1)["error"]["message"]
    assert "holds verdicts of human:ann" in message
    assert (tmp_path / "v.jsonl").read_bytes() == before
    assert judge_server.billed == 0
    check_replaceable(tmp_path / "v.jsonl", "human:ann", ["base", "other"])
    check_replaceable(tmp_path / "absent.jsonl", "any", [])


def test_what_cannot_be_played_is_refused_before_a_call(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, sources: list[str], judge_server: "JudgeServer"
) -> None:
    path = config(tmp_path, endpoint(judge_server))
    message = run(capfd, command(tmp_path / "v.jsonl", path, sources[:1]), code=1)["error"]["message"]
    assert "needs two models or more, got ['base']" in message
    run(capfd, command(tmp_path / "v.jsonl", config(tmp_path, "{kind: none}"), sources), code=2)
    assert judge_server.billed == 0
    book = AnswerBook()
    book.add("x", "p1", Prompt("q1"), "one")
    book.add("y", "p2", Prompt("q2"), "two")
    with pytest.raises(EvaluationError, match=r"no prompt was answered by every model \(answers: x 1, y 1\)"):
        play_tournament(LongestWins(), book, lambda amount: None)
