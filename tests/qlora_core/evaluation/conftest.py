"""A chat-completion server on loopback that judges by a known rule and misbehaves by script."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

ANSWER = re.compile(r"<<<ANSWER ([AB]) \w+>>>\n(.*?)\n<<<END", re.DOTALL)
QUALITY = re.compile(r"quality (\d+)")
INPUT_TOKENS = 1000
OUTPUT_TOKENS = 100

Fault = Callable[[str, int], str | None]


@dataclass
class JudgeServer:
    """The better answer is the one with the higher "quality N". `fault(prompt, attempt)` names what to do instead."""

    fault: Fault = lambda prompt, attempt: None
    delay_s: float = 0.0
    retry_after: str | None = None
    echo: str = ""
    snapshot: str = "judge-1-snapshot"
    honours: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()
    hang_s: float = 1.0
    attempts: Counter[str] = field(default_factory=Counter)
    requests: list[dict[str, Any]] = field(default_factory=list)
    billed: int = 0
    busy: int = 0
    most_busy: int = 0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def billed_usd(self) -> float:
        """What the server's own count comes to at 2 and 8 dollars per million tokens."""
        return self.billed * (INPUT_TOKENS * 2.0 + OUTPUT_TOKENS * 8.0) / 1e6

    def answer(self, request: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for one request."""
        prompt = request["messages"][-1]["content"]
        with self.lock:
            self.attempts[prompt] += 1
            self.requests.append(request)
            fault = self.fault(prompt, self.attempts[prompt])
        time.sleep(self.delay_s)
        refused = self.refuses & request.keys()
        if refused:
            return 400, {}, json.dumps({"error": {"message": f"Unknown parameter: {min(refused)}"}}).encode()
        if fault == "429":
            return (
                429,
                {"Retry-After": self.retry_after} if self.retry_after else {},
                b'{"error": {"message": "slow down"}}',
            )
        if fault == "500":
            return 500, {}, b"<html>oops</html>"
        if fault == "timeout":
            time.sleep(self.hang_s)
            return 504, {}, b"{}"
        if fault == "garbage":
            return 200, {}, b"<html>a proxy says hello</html>"
        if fault is not None and fault.isdigit():
            return int(fault), {}, json.dumps({"error": {"message": f"no: {self.echo}", "code": "x"}}).encode()
        with self.lock:
            self.billed += 1
        return 200, {}, json.dumps(self.completion(prompt, fault, request)).encode()

    def completion(self, prompt: str, fault: str | None, request: dict[str, Any]) -> dict[str, Any]:
        """A billed reply; some faults are in its content."""
        found = {slot: int((QUALITY.findall(text) or ["0"])[0]) for slot, text in ANSWER.findall(prompt)}
        marks = {"A": 0, "B": 0, **found}
        label = "A" if marks["A"] > marks["B"] else "B" if marks["B"] > marks["A"] else "tie"
        verdict = f'{{"verdict": "{label}"}}'
        if "score_a" in prompt:
            verdict = f'{{"score_a": {1 + marks["A"]}, "score_b": {1 + marks["B"]}}}'
        content = {
            "malformed": f"I prefer {label}.",
            "wrong label": '{"verdict": "C"}',
            "empty": "",
        }.get(fault or "", f"Short reasons. {self.echo}\n{verdict}")
        if "response_format" in request and "schema" in self.honours:
            asked = request["response_format"]["json_schema"]["schema"]["properties"]
            content = json.dumps({"probe": asked["probe"]["enum"][0]}) if "probe" in asked else verdict
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if fault == "refusal":
            message = {"role": "assistant", "content": None, "refusal": "I cannot help with that."}
        finish = {"truncated": "length", "filtered": "content_filter"}.get(fault or "", "stop")
        usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS, "total_tokens": 1100}
        return {
            "id": "c1",
            "object": "chat.completion",
            "created": 1,
            "model": self.snapshot,
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": self.logprobs(request)}],
            "usage": usage,
        }

    def logprobs(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """Token log-probabilities where they are asked for and honoured."""
        honoured = "logprobs" in self.honours and request.get("logprobs")
        return {"content": [{"token": "x", "logprob": -0.1}]} if honoured else None


@pytest.fixture
def judge_server() -> Iterator[JudgeServer]:
    """A running server; set its fields to script it."""
    state = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.busy += 1
                state.most_busy = max(state.most_busy, state.busy)
            try:
                self.reply(*state.answer(request))
            finally:
                with state.lock:
                    state.busy -= 1

        def do_GET(self) -> None:
            self.reply(500, {}, b"no list of models here")

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            try:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            return

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
