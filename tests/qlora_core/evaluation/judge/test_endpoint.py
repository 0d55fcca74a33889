import hashlib
import logging
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.errors import ConfigError, JudgeError
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.client import resolve_kind, retry_after_s
from qlora_core.evaluation.judge.endpoint import CALLS_IN_FLIGHT, open_openai_judge
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.evaluation.verdict import Verdict
from qlora_core.store.layout import VERDICTS
from qlora_core.store.local import LocalFolder
from qlora_core.store.shelf import Shelf

if TYPE_CHECKING:
    from conftest import JudgeServer

CANARY = "sk-canary-5d1f0a2b"
ENVIRONMENT = {"OPENAI_API_KEY": CANARY}


def _config(url: str, **settings: object) -> JudgeConfig:
    defaults: dict[str, object] = {
        "model": "judge-1",
        "base_url": url,
        "input_usd_per_million": 2.0,
        "output_usd_per_million": 8.0,
        "budget_usd": 100.0,
        "timeout_s": 0.5,
        "max_retries": 4,
    }
    return JudgeConfig.model_validate({**defaults, **settings})


def _pairs(count: int) -> list[AnswerPair]:
    return [AnswerPair(f"p{i}", f"question {i}", f"quality {i % 5}", f"quality {i % 3} of {i}") for i in range(count)]


def _expected(count: int) -> list[str]:
    return ["a" if i % 5 > i % 3 else "b" if i % 3 > i % 5 else "tie" for i in range(count) for _ in (0, 1)]


def _judge(config: JudgeConfig, count: int, cache: Path | None = None) -> tuple[list[Verdict], float]:
    with VerdictCache(cache) as kept, open_openai_judge(config, ENVIRONMENT, kept, first_backoff_s=0.01) as judge:
        verdicts = judge_pairs(judge, _pairs(count), model_a="x", model_b="y", advance=lambda amount: None)
        return verdicts, judge.cost_usd


def _chance(prompt: str) -> float:
    return int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def test_decide_without_faults_gives_the_rules_verdicts_in_parallel(judge_server: "JudgeServer") -> None:
    judge_server.delay_s = 0.05
    verdicts, cost_usd = _judge(_config(judge_server.url), 30)
    assert [v.verdict for v in verdicts] == _expected(30)
    assert cost_usd == pytest.approx(judge_server.billed_usd, abs=1e-12)
    assert 1 < judge_server.most_busy <= CALLS_IN_FLIGHT
    sent = judge_server.requests[0]
    assert (sent["model"], sent["temperature"], sent["max_tokens"]) == ("judge-1", 0.2, 1024)


def test_decide_null_temperature_is_not_sent(judge_server: "JudgeServer") -> None:
    _judge(_config(judge_server.url, temperature=None), 1)
    assert "temperature" not in judge_server.requests[0]


def test_decide_transport_faults_give_the_same_verdicts_as_none(judge_server: "JudgeServer") -> None:
    judge_server.retry_after = "0.05"
    transient = ["429", "500", "timeout", "408"]
    judge_server.fault = lambda prompt, attempt: (
        transient[int(_chance(prompt) * 40) % 4] if attempt <= 1 and _chance(prompt) < 0.6 else None
    )
    verdicts, cost_usd = _judge(_config(judge_server.url), 20)
    assert [v.verdict for v in verdicts] == _expected(20)
    assert sum(judge_server.attempts.values()) > 45  # the faults did happen
    assert cost_usd == pytest.approx(judge_server.billed_usd, abs=1e-12)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("truncated", "truncated"),
        ("refusal", "refusal"),
        ("filtered", "content_filter"),
        ("malformed", "parse"),
        ("wrong label", "parse"),
        ("empty", "empty"),
        ("garbage", "malformed"),
        ("422", "rejected"),
    ],
)
def test_decide_unusable_reply_is_unscored_billed_and_never_asked_again(
    judge_server: "JudgeServer", fault: str, reason: str
) -> None:
    judge_server.fault = lambda prompt, attempt: fault if "question 2\n" in prompt else None
    verdicts, cost_usd = _judge(_config(judge_server.url), 4)
    expected: list[str | None] = list(_expected(4))
    unscored = [v for v in verdicts if not v.scored]
    assert {v.prompt_id for v in unscored} == {"p2"}
    assert all((v.reason or "").startswith(reason) for v in unscored)
    assert [v.verdict for v in verdicts] == [*expected[:4], None, None, *expected[6:]]
    assert set(judge_server.attempts.values()) == {1}
    assert cost_usd == pytest.approx(judge_server.billed_usd, abs=1e-12)


@pytest.mark.parametrize(("fault", "reason"), [("429", "rate_limit"), ("500", "server_error"), ("timeout", "timeout")])
def test_decide_fault_that_outlasts_the_retries_is_unscored(
    judge_server: "JudgeServer", fault: str, reason: str
) -> None:
    judge_server.fault = lambda prompt, attempt: fault if "question 2\n" in prompt else None
    # The server is silent for a second; a busy machine must not be taken for it.
    verdicts, _ = _judge(_config(judge_server.url, max_retries=1, timeout_s=0.6 if fault == "timeout" else 30), 4)
    assert [v.reason for v in verdicts if not v.scored] == [reason, reason]
    assert sorted(judge_server.attempts.values()) == [1] * 6 + [2, 2]


def test_decide_storm_without_end_stops_asking(judge_server: "JudgeServer") -> None:
    judge_server.fault = lambda prompt, attempt: "429"
    verdicts, cost_usd = _judge(_config(judge_server.url, max_retries=1), 50)
    assert not any(v.scored for v in verdicts)
    assert sum(judge_server.attempts.values()) <= 10
    assert cost_usd == 0


def test_decide_waits_as_long_as_the_server_asks(judge_server: "JudgeServer") -> None:
    judge_server.retry_after = "0.4"
    judge_server.fault = lambda prompt, attempt: "429" if attempt == 1 else None
    started_s = time.monotonic()
    verdicts, _ = _judge(_config(judge_server.url), 1)
    assert all(v.scored for v in verdicts)
    assert time.monotonic() - started_s >= 0.4


def test_decide_budget_stops_before_the_next_call_and_says_so(judge_server: "JudgeServer") -> None:
    judge_server.delay_s = 0.01
    one_call_usd = 0.0028
    verdicts, cost_usd = _judge(_config(judge_server.url, budget_usd=10.5 * one_call_usd), 20)
    unscored = [v for v in verdicts if not v.scored]
    assert (len(verdicts) - len(unscored), judge_server.billed) == (11, 11)
    assert all((v.reason or "").startswith("budget") for v in unscored)
    assert cost_usd == pytest.approx(judge_server.billed_usd, abs=1e-12)


def test_decide_second_run_is_served_from_the_cache(judge_server: "JudgeServer", tmp_path: Path) -> None:
    config = _config(judge_server.url)
    first, first_cost = _judge(config, 6, tmp_path / "cache" / "verdicts.db")
    calls = sum(judge_server.attempts.values())
    second, second_cost = _judge(config, 6, tmp_path / "cache" / "verdicts.db")
    assert (second, second_cost) == (first, pytest.approx(first_cost))
    assert sum(judge_server.attempts.values()) == calls == 12


@pytest.mark.parametrize("change", [{"model": "judge-2"}, {"temperature": 0.3}, {"max_answer_tokens": 99}])
def test_decide_changed_setting_is_another_verdict(
    judge_server: "JudgeServer", tmp_path: Path, change: dict[str, object]
) -> None:
    _judge(_config(judge_server.url), 2, tmp_path / "v.db")
    _judge(_config(judge_server.url, **change), 2, tmp_path / "v.db")
    assert judge_server.billed == 8


def test_decide_failures_are_recorded_but_never_served(judge_server: "JudgeServer", tmp_path: Path) -> None:
    judge_server.fault = lambda prompt, attempt: "malformed" if "question 1\n" in prompt and attempt == 1 else None
    first, _ = _judge(_config(judge_server.url), 3, tmp_path / "v.db")
    second, cost_usd = _judge(_config(judge_server.url), 3, tmp_path / "v.db")
    assert [v.scored for v in first].count(False) == 2
    assert [v.verdict for v in second] == _expected(3)
    assert cost_usd == pytest.approx(judge_server.billed_usd, abs=1e-12)  # the failed attempts stay on the bill
    with sqlite3.connect(tmp_path / "v.db") as connection:
        assert connection.execute("SELECT count(*) FROM attempts").fetchone() == (8,)
        with pytest.raises(sqlite3.IntegrityError, match="never deleted"):
            connection.execute("DELETE FROM attempts")


def test_decide_equal_questions_are_asked_once(judge_server: "JudgeServer") -> None:
    pairs = [AnswerPair(f"p{i}", "same question", "quality 1", "quality 2") for i in range(5)]
    with open_openai_judge(_config(judge_server.url), ENVIRONMENT, None) as judge:
        verdicts = judge_pairs(judge, pairs, model_a="x", model_b="y", advance=lambda amount: None)
    assert [v.verdict for v in verdicts] == ["b"] * 10
    assert judge_server.billed == 2


def test_decide_endpoint_down_names_the_url_and_the_next_step() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match=rf"{url}.*start it.*judge\.kind: offline"):
        _judge(_config(url, max_retries=1), 3)
    with (
        open_openai_judge(_config(url), ENVIRONMENT, None) as judge,
        pytest.raises(JudgeError, match="cannot be reached"),
    ):
        judge.check()


@pytest.mark.parametrize(
    ("fault", "message"),
    [("401", "OPENAI_API_KEY"), ("403", "OPENAI_API_KEY"), ("404", "does not know the model 'judge-1'")],
)
def test_decide_hopeless_first_call_is_an_error_after_one_request(
    judge_server: "JudgeServer", fault: str, message: str
) -> None:
    judge_server.fault = lambda prompt, attempt: fault
    judge_server.echo = CANARY
    with pytest.raises(JudgeError, match=message) as caught:
        _judge(_config(judge_server.url), 3)
    assert CANARY not in str(caught.value)
    assert sum(judge_server.attempts.values()) == 1


def test_decide_key_revoked_on_the_way_leaves_the_rest_unscored(judge_server: "JudgeServer") -> None:
    judge_server.fault = lambda prompt, attempt: "401" if judge_server.billed >= 5 else None
    verdicts, _ = _judge(_config(judge_server.url), 20)
    assert 5 <= sum(v.scored for v in verdicts) < 5 + CALLS_IN_FLIGHT
    assert sum(judge_server.attempts.values()) <= 5 + 2 * CALLS_IN_FLIGHT


def test_decide_refused_limit_name_is_learned(judge_server: "JudgeServer") -> None:
    original = judge_server.answer

    def strict(request: dict[str, object]) -> tuple[int, dict[str, str], bytes]:
        if "max_tokens" in request:
            return 400, {}, b'{"error": {"message": "Unsupported parameter: \'max_tokens\' is not supported"}}'
        return original(request)

    judge_server.answer = strict
    verdicts, _ = _judge(_config(judge_server.url), 3)
    assert [v.verdict for v in verdicts] == _expected(3)


def test_open_judge_unknown_price_is_an_error_before_any_call(judge_server: "JudgeServer") -> None:
    config = _config(judge_server.url, input_usd_per_million=None)
    with pytest.raises(ConfigError, match="input_usd_per_million"):
        _judge(config, 1)
    assert judge_server.requests == []


def test_open_judge_without_key_at_openais_own_endpoint_names_the_variable() -> None:
    with pytest.raises(JudgeError, match="OPENAI_API_KEY"), open_openai_judge(JudgeConfig.model_validate({}), {}, None):
        pytest.fail("opened without a key")


def test_open_judge_custom_endpoint_needs_no_key_and_is_uncertified(judge_server: "JudgeServer") -> None:
    with open_openai_judge(_config(judge_server.url), {}, None) as judge:
        assert judge.certified is False
        judge.check()


def test_open_judge_address_from_the_environment_counts_as_custom(judge_server: "JudgeServer") -> None:
    environment = {**ENVIRONMENT, "OPENAI_BASE_URL": judge_server.url}
    with (
        pytest.raises(ConfigError, match="custom endpoint"),
        open_openai_judge(JudgeConfig.model_validate({"model": "gpt-4.1"}), environment, None),
    ):
        pytest.fail("opened without prices")


def test_decide_on_another_machine_pays_for_nothing_that_is_shared(judge_server: "JudgeServer", tmp_path: Path) -> None:
    def decide(machine: str) -> list[str | None]:
        shared = Shelf(LocalFolder(tmp_path / "store"), VERDICTS)
        config = _config(judge_server.url)
        with VerdictCache(tmp_path / machine, shared) as kept, open_openai_judge(config, ENVIRONMENT, kept) as judge:
            verdicts = judge_pairs(judge, _pairs(4), model_a="x", model_b="y", advance=lambda amount: None)
        return [verdict.verdict for verdict in verdicts]

    assert decide("one.db") == _expected(4)
    asked = len(judge_server.requests)
    assert asked
    assert decide("other.db") == _expected(4)
    assert len(judge_server.requests) == asked


def test_open_judge_cache_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.db").write_text("these are not the bytes of a database" * 100)
    with (
        pytest.raises(JudgeError, match=r"v\.db cannot be used"),
        VerdictCache(tmp_path / "v.db"),
    ):
        pytest.fail("opened a broken cache")


def test_decide_key_reaches_no_log_cache_or_verdict(
    judge_server: "JudgeServer", tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge_server.echo = CANARY  # a server that quotes the key in replies and errors
    judge_server.fault = lambda prompt, attempt: "422" if "question 1\n" in prompt else None
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("qlora_core").setLevel(logging.DEBUG)
        verdicts, _ = _judge(_config(judge_server.url), 3, tmp_path / "v.db")
    own_records = [record.getMessage() for record in caplog.records if record.name.startswith("qlora_core")]
    assert own_records  # negative control: something was logged
    assert CANARY not in "".join(own_records)
    assert CANARY not in "".join(v.model_dump_json() for v in verdicts)
    stored = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"Short reasons. ***" in stored  # negative control: the replies are there, without the key
    assert CANARY.encode() not in stored


def test_decide_killed_run_resumes_without_paying_twice(judge_server: "JudgeServer", tmp_path: Path) -> None:
    judge_server.delay_s = 0.05
    cache = tmp_path / "v.db"
    script = (
        "import sys; from pathlib import Path\n"
        "sys.path.insert(0, sys.argv[1]); import test_endpoint as t\n"
        "t._judge(t._config(sys.argv[2]), 40, Path(sys.argv[3]))\n"
    )
    folder = str(Path(__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", script, folder, judge_server.url, str(cache)])
    deadline_s = time.monotonic() + 60
    while judge_server.billed < 20 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.2)  # calls in flight at the kill end on the server
    asked_before = sum(judge_server.attempts.values())
    with sqlite3.connect(cache) as connection:
        (recorded,) = connection.execute("SELECT count(*) FROM attempts WHERE slot IS NOT NULL").fetchone()
    assert 12 <= recorded < 80
    assert asked_before - recorded <= CALLS_IN_FLIGHT
    verdicts, cost_usd = _judge(_config(judge_server.url), 40, cache)
    assert [v.verdict for v in verdicts] == _expected(40)
    assert sum(judge_server.attempts.values()) - asked_before == 80 - recorded
    assert cost_usd == pytest.approx(80 * 0.0028, abs=1e-9)


def test_resolve_kind_auto_follows_the_key() -> None:
    assert resolve_kind(JudgeConfig.model_validate({}), {}) == "offline"
    assert resolve_kind(JudgeConfig.model_validate({}), ENVIRONMENT) == "openai"
    assert resolve_kind(JudgeConfig.model_validate({"kind": "none"}), ENVIRONMENT) == "none"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after-ms": "250", "retry-after": "2"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 100.0),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_retry_after_reads_seconds_and_dates(headers: dict[str, str], expected: float | None) -> None:
    assert retry_after_s(headers, now_s=0.0) == expected


def test_importing_the_judge_loads_no_client() -> None:
    code = (
        "import sys, qlora_core.evaluation.judge.endpoint as m; assert not {'aiohttp', 'torch'} & set(sys.modules), m"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    source = Path(sys.modules[resolve_kind.__module__].__file__ or "").read_text()
    assert re.search(r"^\s+import aiohttp$", source, re.M)
