"""The endpoint through its own door: sockets, JSON, server-sent events."""

import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch

from qlora_core.model.adapter_set import AdapterSet
from qlora_core.model.generate import generate_answers
from qlora_core.serving.served import Served
from qlora_core.serving.server import Limits, ModelServer

Call = Callable[..., Any]
Answering = Callable[..., Any]
POSITIONS = 256
QUESTIONS = ["Hi", "What is a tiger, and why?", "a b c", "7 + 5 =", "Tell me a tale of two cities, please.", "x"]
TOKEN = "correct-horse-battery-staple"


def chat(model: str, question: str = "Hi", **settings: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, **settings}


def text_of(reply: Any) -> str:
    assert reply.status == 200, reply.body
    return reply.json["choices"][0]["message"]["content"]


def test_answers_are_those_of_generate_answers(served: Served, ask: Call) -> None:
    """The loop that evaluation uses: another code path over the same base."""
    assert isinstance(served.model, AdapterSet)
    for name, model in served.models.items():
        prompts = [model.chat.render([_user(question)], add_generation_prompt=True) for question in QUESTIONS[:3]]
        expected = generate_answers(
            served.model,
            model.chat.tokenizer,
            prompts,
            max_new_tokens=20,
            batch_size=3,
            stop_token_id=model.chat.stop_token_id,
            adapters=[model.adapter] * 3,
        )
        given = [text_of(ask("/chat/completions", **chat(name, question, max_tokens=20))) for question in QUESTIONS[:3]]
        assert given == expected
    assert len({text_of(ask("/chat/completions", **chat(name, max_tokens=20))) for name in served.models}) == 4


def test_requests_for_different_adapters_share_a_batch_and_are_answered_as_alone(
    served: Served, answering: Answering, call: Call
) -> None:
    asked = [
        chat(name, question, max_tokens=8 + 5 * place)
        for place, question in enumerate(QUESTIONS)
        for name in served.models
    ]
    with answering(served, Limits(rows=32)) as server:
        alone = [call(server.url, "POST", "/chat/completions", body).json for body in asked]
        assert server.engine.load.largest_batch == 1
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda body: call(server.url, "POST", "/chat/completions", body).json, asked))
        assert server.engine.load.largest_batch > 4
    assert [reply["choices"] for reply in together] == [reply["choices"] for reply in alone]
    assert [reply["usage"] for reply in together] == [reply["usage"] for reply in alone]


def test_a_seed_gives_the_same_answer_alone_and_beside_others(served: Served, answering: Answering, call: Call) -> None:
    body = chat("legal", max_tokens=30, seed=11) | {"temperature": 0.9, "top_p": 0.9}
    with answering(served) as server, ThreadPoolExecutor(8) as pool:
        alone = text_of(call(server.url, "POST", "/chat/completions", body))
        bodies = [body, *(chat(name, question, max_tokens=30) for name in ("tales", "base") for question in QUESTIONS)]
        beside = list(pool.map(lambda each: call(server.url, "POST", "/chat/completions", each), bodies))
        assert text_of(beside[0]) == alone
        others = {text_of(call(server.url, "POST", "/chat/completions", body | {"seed": seed})) for seed in range(4)}
    assert len(others | {alone}) > 3


def test_a_stream_is_the_whole_answer_in_pieces(ask: Call) -> None:
    asked = chat("tales", QUESTIONS[1], max_tokens=25, logprobs=True, top_logprobs=2)
    whole = ask("/chat/completions", **asked).json
    events = ask("/chat/completions", **asked, stream=True, stream_options={"include_usage": True}).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [event["choices"][0] for event in events[1:-1]]
    text = "".join(piece["delta"].get("content", "") for piece in pieces)
    logs = [entry for piece in pieces for entry in (piece["logprobs"] or {"content": []})["content"]]
    assert text == whole["choices"][0]["message"]["content"]
    assert logs == whole["choices"][0]["logprobs"]["content"] and len(logs) == 25
    assert pieces[-1]["finish_reason"] == whole["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == [] and events[-1]["usage"] == whole["usage"]
    assert len(pieces) > 5


def test_logprobs_are_the_models_own(served: Served, ask: Call) -> None:
    """Against a forward pass of the prompt alone, softmax in float64."""
    model = served.models["base"]
    ids = model.chat.encode([model.chat.render([_user("Hi")], add_generation_prompt=True)])[0]
    assert isinstance(served.model, AdapterSet)
    with torch.inference_mode():
        logits = served.model.base(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    expected = logits.double().log_softmax(-1)
    entry = ask("/chat/completions", **chat("base", max_tokens=1, logprobs=True, top_logprobs=3)).json["choices"][0]
    told = entry["logprobs"]["content"][0]
    assert told["logprob"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert [each["logprob"] for each in told["top_logprobs"]] == pytest.approx(
        expected.topk(3).values.tolist(), abs=1e-5
    )


def test_a_stop_string_ends_the_answer_before_it(ask: Call) -> None:
    whole = text_of(ask("/chat/completions", **chat("support", max_tokens=30)))
    stop = whole[6:8]
    for stream in (False, True):
        reply = ask("/chat/completions", **chat("support", max_tokens=30, stop=["never said", stop], stream=stream))
        if stream:
            found = "".join(event["choices"][0]["delta"].get("content", "") for event in reply.events)
            reason = reply.events[-1]["choices"][0]["finish_reason"]
        else:
            found, reason = text_of(reply), reply.json["choices"][0]["finish_reason"]
        assert found == whole[: whole.index(stop)] and reason == "stop"


def test_completions_take_text_and_token_ids(served: Served, ask: Call) -> None:
    ids = served.models["legal"].chat.encode(["abc"])[0]
    asked = {"model": "legal", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    by_text, by_ids = (ask("/completions", **asked, prompt=prompt).json for prompt in ("abc", ids))
    assert by_text["choices"] == by_ids["choices"]
    assert by_text["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 6, "total_tokens": len(ids) + 6}
    assert len(by_text["choices"][0]["logprobs"]["token_logprobs"]) == 6


def test_an_answer_ends_where_the_positions_end(ask: Call) -> None:
    reply = ask("/completions", model="base", prompt="a" * (POSITIONS - 4), temperature=0, max_tokens=50).json
    assert reply["usage"]["total_tokens"] <= POSITIONS
    assert reply["choices"][0]["finish_reason"] == "length" or reply["usage"]["completion_tokens"] < 4


@pytest.mark.parametrize(
    ("change", "status", "param", "said"),
    [
        ({"model": "nobody"}, 404, "model", "base, support, legal, tales"),
        ({"n": 2}, 400, "n", "n: 2 is not supported"),
        ({"top_k": 5}, 400, "top_k", "top_k is not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "0.5 is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "json_object"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"temperature": 3}, 400, "temperature", "less than or equal to 2, not 3"),
        ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, 400, "max_tokens", "differ"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs: true"),
        ({"stop": [""]}, 400, "stop", "empty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role", "system"),
        ({"messages": [{"role": "user", "content": "a" * POSITIONS}]}, 400, "messages", f"takes {POSITIONS}"),
        ({"messages": [{"role": "user", "content": "<|end|>"}]}, 400, "messages.0.content", "special token"),
    ],
)  # fmt: skip
def test_what_is_not_offered_is_refused_by_name(
    ask: Call, change: dict[str, Any], status: int, param: str, said: str
) -> None:
    reply = ask("/chat/completions", **(chat("base", max_tokens=2) | change))
    assert reply.status == status, reply.body
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    assert reply.json["error"]["param"] == param and said in reply.json["error"]["message"]


def test_neutral_settings_are_taken(ask: Call) -> None:
    plain = ask("/chat/completions", **chat("base", max_tokens=4)).json["choices"]
    neutral = {"n": 1, "presence_penalty": 0.0, "logit_bias": {}, "tools": None, "user": "ann", "stop": None}
    assert ask("/chat/completions", **chat("base", max_tokens=4), **neutral).json["choices"] == plain


def test_odd_requests_have_errors_of_the_same_shape(server: ModelServer, call: Call) -> None:
    for method, path, body, headers, status in (
        ("POST", "/chat/completions", b"{", {}, 400),
        ("POST", "/chat/completions", b"[1]", {}, 400),
        ("POST", "/chat/completions", b"{}", {"Content_Type": "text/plain"}, 415),
        ("GET", "/chat/completions", None, {}, 405),
        ("GET", "/nowhere", None, {}, 404),
        ("GET", "/models/nobody", None, {}, 404),
        ("GET", "/models", None, {"Host": "evil.example"}, 403),
        ("POST", "/chat/completions", b"{}", {"Origin": "https://evil.example"}, 403),
    ):
        reply = call(server.url, method, path, body, **headers)
        assert (reply.status, set(reply.json)) == (status, {"error"}), (path, reply.body)
    assert call(server.url, "GET", "/models/legal").json["qlora"]["bound_by"] == "digest"


def test_a_long_body_is_refused_whether_or_not_its_length_is_told(
    served: Served, answering: Answering, call: Call
) -> None:
    body = json.dumps(chat("base", "a" * 3000)).encode()
    with answering(served, Limits(body_bytes=2000)) as server:
        assert call(server.url, "POST", "/chat/completions", body).status == 413
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1500], body[1500:]))
        with socket.create_connection(_address(server)) as client:
            client.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n"
            )
            assert client.recv(4096).startswith(b"HTTP/1.1 413")
        assert call(server.url, "POST", "/chat/completions", chat("base", max_tokens=2)).status == 200


def test_a_token_is_asked_for_everywhere_but_at_health(served: Served, answering: Answering, call: Call) -> None:
    with answering(served, token=TOKEN) as server:
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": f"Basic {TOKEN}"},
            {"Authorization": "é"},
        ):
            for method, path in (("GET", "/models"), ("POST", "/chat/completions"), ("POST", "/completions")):
                reply = call(server.url, method, path, chat("base", max_tokens=1), **given)
                assert (reply.status, reply.json["error"]["code"]) == (401, "invalid_api_key")
                assert TOKEN not in reply.body.decode()
        assert call(server.url, "GET", "/models", None, Authorization=f"Bearer {TOKEN}").status == 200
        health = call(server.url, "GET", "/../health")
        assert health.status == 200 and TOKEN not in health.body.decode()


def test_a_full_queue_turns_requests_away_and_then_takes_them_again(
    served: Served, answering: Answering, call: Call
) -> None:
    bodies = [chat("legal", question, max_tokens=60) for question in QUESTIONS * 2]
    with answering(served, Limits(rows=1, waiting=2)) as server, ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: call(server.url, "POST", "/chat/completions", body), bodies))
        refused = [reply for reply in replies if reply.status == 429]
        assert refused and all(reply.headers["retry-after"] == "1" for reply in refused)
        assert sum(reply.status == 200 for reply in replies) >= 3
        assert call(server.url, "POST", "/chat/completions", bodies[0]).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(served: Served, stream: bool, answering: Answering) -> None:
    body = json.dumps(chat("tales", max_tokens=POSITIONS, stream=stream, stop=["never said"])).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with answering(served, Limits(rows=1)) as server, _slow_steps(served):
        client = socket.create_connection(_address(server))
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        _wait(lambda: server.engine.load.answering == 1)
        client.close()
        started = time.monotonic()
        _wait(lambda: server.engine.load.answering == 0)
        # whole, the answer would take 0.05 s for each of its 200 and more tokens
        assert time.monotonic() - started < 5


def test_a_stopping_server_tells_those_who_wait(served: Served, answering: Answering, call: Call) -> None:
    with answering(served, Limits(rows=1)) as server, _slow_steps(served):
        with ThreadPoolExecutor(1) as pool:
            reply = pool.submit(call, server.url, "POST", "/chat/completions", chat("tales", max_tokens=POSITIONS))
            _wait(lambda: server.engine.load.answering == 1)
            server.engine.stop()
            assert reply.result(30).status == 500 and "stopped" in reply.result().json["error"]["message"]
        assert call(server.url, "GET", "/../health").status == 503
        assert call(server.url, "POST", "/chat/completions", chat("base")).status == 503


def test_nan_is_an_error_for_its_own_adapter_alone(served: Served, answering: Answering, call: Call) -> None:
    """A wild value is put into one adapter's factors, in place, where it is served from."""
    assert isinstance(served.model, AdapterSet)
    target = next(iter(served.model.base.get_submodule("model.layers.0.mlp.down_proj")._forward_hooks.values())).args[1]  # pyright: ignore[reportFunctionMemberAccess]
    columns = next(columns for columns in target.layout if columns.adapter == "support")
    before = target.b_so[columns.start].clone()
    target.b_so[columns.start] = float("nan")
    try:
        with answering(served) as server, ThreadPoolExecutor(2) as pool:
            bodies = [chat("support", max_tokens=5), chat("base", max_tokens=5)]
            wild, calm = pool.map(lambda body: call(server.url, "POST", "/chat/completions", body), bodies)
            assert wild.status == 500 and "NaN" in wild.json["error"]["message"]
            assert calm.status == 200
    finally:
        target.b_so[columns.start] = before


class _slow_steps:  # noqa: N801 - reads as a statement
    """Every forward pass of the base takes 50 ms more."""

    def __init__(self, served: Served) -> None:
        base = served.model.base if isinstance(served.model, AdapterSet) else served.model
        self._hook = base.register_forward_pre_hook(lambda module, args: time.sleep(0.05))

    def __enter__(self) -> None:
        """Nothing to do: the hook is there."""

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def _user(text: str) -> Any:
    from qlora_core.data.row import Message

    return Message("user", text)


def _address(server: ModelServer) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or 0


def _wait(done: Any) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)
