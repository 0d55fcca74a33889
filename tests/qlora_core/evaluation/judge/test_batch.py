"""Judging through batches: the same verdicts as by single calls, at the batch price, and never paid for twice."""

import email.parser
import email.policy
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qlora_core.config.evaluate import EvaluateConfig, JudgeConfig
from qlora_core.errors import JudgeError
from qlora_core.evaluation.judge.budget import Prices, estimate_cost_usd
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.endpoint import open_openai_judge
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.evaluation.verdict import Verdict

if TYPE_CHECKING:
    from conftest import JudgeServer

Answer = Callable[[dict[str, Any]], tuple[int, dict[str, str], bytes]]


@dataclass
class BatchServer:
    """Files and batches in memory; a batch ends after `polls` looks at it, each line answered by `answer`."""

    answer: Answer
    polls: int = 1
    end: str = "completed"
    lost: int = 0
    files: dict[str, bytes] = field(default_factory=dict)
    batches: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    url: str = ""

    def post(self, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        """Take a file or make a batch."""
        if path == "/v1/files":
            head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
            form = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            parts: dict[Any, Any] = {
                part.get_param("name", header="content-disposition"): part for part in form.iter_parts()
            }
            assert parts["purpose"].get_payload(decode=True) == b"batch"
            name = f"file-{len(self.files)}"
            self.files[name] = parts["file"].get_payload(decode=True)
            return 200, {"id": name}
        made = json.loads(body)
        self.sizes.append(len(self.files[made["input_file_id"]].strip().split(b"\n")))
        batch = {**made, "id": f"batch-{len(self.batches)}", "status": "in_progress", "looks": 0}
        self.batches.append(batch)
        return 200, batch

    def get(self, path: str) -> tuple[int, Any]:
        """The list of batches, one of them, or a file."""
        if not path.startswith(("/v1/batches", "/v1/files/")):
            return 404, {"error": {"message": "no such path"}}
        if path.startswith("/v1/batches?"):
            return 200, {"data": self.batches}
        if path.startswith("/v1/files/"):
            return 200, self.files[path.split("/")[3]]
        batch = next(each for each in self.batches if path.endswith(f"/{each['id']}"))
        batch["looks"] += 1
        if batch["looks"] >= self.polls and batch["status"] == "in_progress":
            self._finish(batch)
        return 200, batch

    def _finish(self, batch: dict[str, Any]) -> None:
        batch["status"] = self.end
        if self.end == "failed":
            batch["errors"] = {"data": [{"code": "model_not_found", "message": "no such model"}]}
            return
        lines = [json.loads(line) for line in self.files[batch["input_file_id"]].split(b"\n") if line]
        kept, self.lost = lines[self.lost :], 0
        done = []
        for line in kept:
            status, _, body = self.answer(line["body"])
            response = {"status_code": status, "body": json.loads(body)}
            done.append({"custom_id": line["custom_id"], "response": response, "error": None})
        batch["output_file_id"] = f"out-{batch['id']}"
        self.files[batch["output_file_id"]] = "".join(json.dumps(each) + "\n" for each in done).encode()


@pytest.fixture
def batches(judge_server: "JudgeServer") -> Iterator[BatchServer]:
    """A running server of batches, whose lines are answered as `judge_server` answers calls."""
    state = BatchServer(judge_server.answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.reply(*state.post(self.path, self.headers, body))

        def do_GET(self) -> None:
            self.reply(*state.get(self.path))

        def reply(self, status: int, found: Any) -> None:
            body = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()


def _config(url: str, **settings: object) -> JudgeConfig:
    defaults: dict[str, object] = {
        "model": "judge-1", "base_url": url, "input_usd_per_million": 2.0, "output_usd_per_million": 8.0,
        "budget_usd": 100.0, "batch": True, "batch_poll_s": 0.02,
    }  # fmt: skip
    return JudgeConfig.model_validate({**defaults, **settings})


def _judge(config: JudgeConfig, count: int = 6, cache: Path | None = None) -> tuple[list[Verdict], float]:
    pairs = [AnswerPair(f"p{i}", f"question {i}", f"quality {i % 5}", f"quality {i % 3} of {i}") for i in range(count)]
    with VerdictCache(cache) as kept, open_openai_judge(config, {}, kept, first_backoff_s=0.01) as judge:
        verdicts = judge_pairs(judge, pairs, model_a="x", model_b="y", advance=lambda amount: None)
        return verdicts, judge.cost_usd


def test_batch_gives_the_verdicts_of_single_calls_at_half_the_price(
    judge_server: "JudgeServer", batches: BatchServer
) -> None:
    by_calls, full_usd = _judge(_config(judge_server.url, batch=False))
    by_batch, half_usd = _judge(_config(batches.url))
    assert by_batch == by_calls
    assert half_usd == pytest.approx(full_usd / 2)
    assert batches.sizes == [12]


def test_batch_is_asked_again_only_for_the_lines_that_are_missing(
    judge_server: "JudgeServer", batches: BatchServer
) -> None:
    batches.lost = 5
    verdicts, _ = _judge(_config(batches.url))
    assert all(verdict.scored for verdict in verdicts)
    assert batches.sizes == [12, 5]
    assert judge_server.billed == 12


def test_batch_learns_the_name_of_the_token_limit(judge_server: "JudgeServer", batches: BatchServer) -> None:
    judge_server.refuses = frozenset({"max_tokens"})
    verdicts, _ = _judge(_config(batches.url))
    assert all(verdict.scored for verdict in verdicts)
    assert batches.sizes == [12, 12]


def test_batch_never_exceeds_the_budget(judge_server: "JudgeServer", batches: BatchServer) -> None:
    _, whole_usd = _judge(_config(batches.url))
    batches.sizes.clear()
    config = _config(batches.url, budget_usd=whole_usd / 2)
    verdicts, cost_usd = _judge(config)
    scored = sum(verdict.scored for verdict in verdicts)
    assert 0 < scored < 12
    assert cost_usd <= whole_usd / 2
    assert {verdict.reason for verdict in verdicts if not verdict.scored} == {
        f"budget: {whole_usd / 2:g} USD are spent"
    }
    assert sum(batches.sizes) == scored


def test_batch_that_fails_as_a_whole_is_unscored_with_its_reason(
    judge_server: "JudgeServer", batches: BatchServer
) -> None:
    batches.end = "failed"
    verdicts, cost_usd = _judge(_config(batches.url))
    assert {verdict.reason for verdict in verdicts} == {"batch"}
    assert (cost_usd, len(batches.batches)) == (0.0, 1)


def test_endpoint_without_batches_says_which_setting_helps(batches: BatchServer) -> None:
    with pytest.raises(JudgeError, match=r"it may offer no batches: set evaluate\.judge\.batch: false"):
        _judge(_config(f"{batches.url}/elsewhere"))


KILLED = """
import sys
from pathlib import Path
from qlora_core.config.evaluate import JudgeConfig
sys.path.insert(0, sys.argv[1])
from test_batch import _config, _judge
_judge(_config(sys.argv[2]), cache=Path(sys.argv[3]))
"""


@pytest.mark.parametrize("noted", [True, False])
def test_killed_run_goes_on_with_its_batch_and_pays_once(
    judge_server: "JudgeServer", batches: BatchServer, tmp_path: Path, noted: bool
) -> None:
    batches.polls = 10**9
    cache = tmp_path / "verdicts.db"
    arguments = [str(Path(__file__).parent), batches.url, str(cache)]
    with subprocess.Popen([sys.executable, "-c", KILLED, *arguments]) as run:
        deadline = time.monotonic() + 60
        while not (batches.batches and batches.batches[0]["looks"] > 1):
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        run.kill()
    if not noted:  # as if it had died between making the batch and noting it
        cache.unlink()
    batches.polls = 1
    verdicts, cost_usd = _judge(_config(batches.url), cache=cache)
    assert all(verdict.scored for verdict in verdicts)
    assert (len(batches.batches), judge_server.billed) == (1, 12)
    assert cost_usd == pytest.approx(judge_server.billed_usd / 2)
    again, _ = _judge(_config(batches.url), cache=cache)
    assert (again, judge_server.billed) == (verdicts, 12)


def test_planned_cost_of_batches_is_their_share() -> None:
    config = EvaluateConfig.model_validate({"judge": {"batch": True, "batch_price": 0.25}})
    single = EvaluateConfig()
    prices = Prices(2.0, 8.0)
    assert estimate_cost_usd(config, prices) == pytest.approx(estimate_cost_usd(single, prices) / 4)
