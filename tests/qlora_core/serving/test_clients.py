"""What is known to talk to such endpoints talks to this one: the judge's client, OpenAI's package, `qlora chat`."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from rich.console import Console

from qlora_core.config.evaluate import JudgeConfig
from qlora_core.errors import ConfigError, ModelError, RegistryError, ServingError
from qlora_core.evaluation.judge.client import Failure, JudgeClient, Reply
from qlora_core.evaluation.judge.endpoint import open_openai_judge
from qlora_core.evaluation.pairwise import AnswerPair, judge_pairs
from qlora_core.registry.model_address import present_aliases, resolve_address
from qlora_core.serving.admission import AdapterSource
from qlora_core.serving.client import ChatClient
from qlora_core.serving.served import Served, open_served
from qlora_core.serving.server import ModelServer, open_model_server
from qlora_core.serving.terminal import Conversation

QLORA = Path(sys.executable).parent / "qlora"


def judge_config(server: ModelServer, model: str = "legal") -> JudgeConfig:
    return JudgeConfig.model_validate(
        {"kind": "openai", "model": model, "base_url": server.url, "max_answer_tokens": 16, "timeout_s": 60,
         "input_usd_per_million": 0.0, "output_usd_per_million": 0.0}
    )  # fmt: skip


def test_the_judge_client_is_answered(server: ModelServer) -> None:
    async def ask(model: str) -> Reply | Failure:
        async with JudgeClient(judge_config(server, model), {}) as client:
            await client.check()
            return await client.ask([{"role": "user", "content": "Which is better?"}], {"logprobs": True})

    reply = asyncio.run(ask("legal"))
    assert isinstance(reply, Reply), reply
    assert reply.model == "legal" and reply.log_probabilities and (reply.output_tokens or 0) > 0
    refused = asyncio.run(ask("nobody"))
    assert isinstance(refused, Failure) and refused.reason == "not_found"


def test_a_judgement_by_a_served_adapter_ends_with_a_verdict_or_unscored(server: ModelServer) -> None:
    """A model of random weights keeps to no form: every verdict is unscored, none is guessed."""
    pairs = [AnswerPair("p", "What is red?", "an apple", "snow")]
    with open_openai_judge(judge_config(server), {}, None) as judge:
        verdicts = judge_pairs(judge, pairs, model_a="x", model_b="y", advance=lambda amount: None)
    assert len(verdicts) == 2 and all(verdict.verdict is None and verdict.reason for verdict in verdicts)


def test_openais_package_is_answered(server: ModelServer) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["base", "support", "legal", "tales"]
    asked: dict[str, Any] = {
        "model": "tales", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "max_tokens": 12
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="n: 2 is not supported"):
        client.chat.completions.create(**asked, n=2)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**(asked | {"model": "nobody"}))


def test_a_conversation_keeps_a_history_for_each_model(server: ModelServer) -> None:
    out = io.StringIO()
    client = ChatClient(server.url)
    talk = Conversation(client, Console(file=out, width=100), ["legal"], {"temperature": 0, "max_tokens": 6})
    talk.run(["Hi\n", "\n", "And you?\n", "/adapter tales\n", "Hi\n", "/adapter nobody\n", "/nonsense\n"])
    assert [len(talk.histories[name]) for name in ("legal", "tales")] == [4, 2]
    first = "".join(client.chat("legal", [{"role": "user", "content": "Hi"}], {"temperature": 0, "max_tokens": 6}))
    assert talk.histories["legal"][1] == {"role": "assistant", "content": first}
    again = [*talk.histories["legal"][:2], {"role": "user", "content": "And you?"}]
    assert talk.histories["legal"][3]["content"] == "".join(
        client.chat("legal", again, {"temperature": 0, "max_tokens": 6})
    )
    assert "no model is named 'nobody'" in out.getvalue() and "/nonsense is no command" in out.getvalue()
    talk.run(["/compare legal base", "Hi", "/reset", "Hi", "/quit", "never asked"])
    assert talk.current == ("legal", "base")
    assert [len(talk.histories[name]) for name in ("legal", "base")] == [2, 2]
    assert talk.histories["legal"][1]["content"] == first


def test_a_client_says_what_is_wrong(server: ModelServer) -> None:
    with pytest.raises(ServingError, match=r"HTTP 404.*nobody"):
        list(ChatClient(server.url).chat("nobody", [{"role": "user", "content": "Hi"}], {}))
    with pytest.raises(ServingError, match=r"HTTP 404.*ends in /v1"):
        ChatClient(server.url.removesuffix("/v1")).models()
    with pytest.raises(ServingError, match="does not answer"):
        ChatClient("http://127.0.0.1:9/v1").models()
    with pytest.raises(ConfigError, match="no http"):
        ChatClient("localhost:8000")


def test_another_bases_adapter_is_refused(base_folder: Path, adapter_folders: dict[str, Path], tmp_path: Path) -> None:
    def serve(folder: Path, **source: Any) -> None:
        with open_served(base_folder, [AdapterSource("x", folder, **source)], device="cpu"):
            pytest.fail("it was served")

    foreign = copytree(adapter_folders["legal"], tmp_path / "foreign")
    (foreign / "qlora.json").write_text(json.dumps({"quantized_base_digest": "f" * 64}))
    with pytest.raises(ModelError, match="was trained on base ffff"):
        serve(foreign)
    with pytest.raises(ModelError, match="was trained on base eeee"):
        serve(adapter_folders["legal"], base_digest="e" * 64)  # the registry's word counts
    (foreign / "qlora.json").unlink()
    with pytest.raises(ModelError, match="records no base and has no golden logits"):
        serve(foreign)
    with pytest.raises(ModelError, match="no adapter folder"):
        serve(tmp_path / "nothing")
    with open_served(base_folder, [AdapterSource("x", foreign)], device="cpu", allow_unbound=True) as served:
        assert served.models["x"].bound_by == "shapes"
    twice = [AdapterSource("x", foreign), AdapterSource("x", foreign)]
    with pytest.raises(ConfigError, match="two models"), open_served(base_folder, twice, device="cpu"):
        pass


def test_beyond_loopback_a_token_is_needed(served: Served) -> None:
    for host, environment in (("0.0.0.0", {}), ("127.0.0.1", {"QLORA_SERVE_TOKEN": "short"})):
        with pytest.raises(ConfigError, match="QLORA_SERVE_TOKEN"):
            open_model_server(served, host=host, port=0, environment=environment)


def test_an_address_that_means_nothing_is_refused(tmp_path: Path) -> None:
    missing = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for address, said in (("models:/x", "no address"), ("models:/x@champion", "there is no registry")):
        with pytest.raises(RegistryError, match=said):
            resolve_address(missing, address, tmp_path)
    with pytest.raises(RegistryError, match="neither champion nor challenger"):
        present_aliases(missing, "x")
    assert not (tmp_path / "mlflow.db").exists()


def test_the_commands_as_people_run_them(base_folder: Path, adapter_folders: dict[str, Path], qlora: Callable) -> None:
    adapter = f"legal={adapter_folders['legal']}"
    command = [str(QLORA), "serve", str(base_folder), "--adapter", adapter, "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["models"] == ["nf4", "legal"] and said["needs_token"] is False
        talk = subprocess.run(
            [str(QLORA), "chat", "--url", said["url"], "--model", "legal", "--max-tokens", "5", "--json"],
            input="Hi\n", capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert [turn["role"] for turn in json.loads(talk.stdout)["histories"]["legal"]] == ["user", "assistant"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    wrong = qlora("serve", base_folder, "--host", "0.0.0.0", "--json")
    assert wrong.returncode == 2 and "QLORA_SERVE_TOKEN" in json.loads(wrong.stdout)["error"]["message"]
    assert qlora("serve", base_folder, "--adapter", "models:/a@champion", "--json").returncode == 2
