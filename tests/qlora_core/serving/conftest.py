"""A tiny quantized Llama that says different things with each of its adapters, and a real server over it."""

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.demo.tokenizer import train_tokenizer
from qlora_core.model.base import load_quantized
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.serving.admission import AdapterSource, base_digest
from qlora_core.serving.served import Served, open_served
from qlora_core.serving.server import Limits, ModelServer, open_model_server

POSITIONS = 256
ADAPTERS = {"support": 2, "legal": 4, "tales": 8}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in a fixed order; and bitsandbytes' fallback operators uncompiled, which would take seconds per shape."""
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield


def write_base(folder: Path, seed: int) -> Path:
    """Weights large enough for logits to be far apart: greedy answers do not hang on rounding."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / "plain")
    train_tokenizer(["a b c"], vocab_size=300, max_tokens=128).save_pretrained(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "nf4", QuantizeConfig())
    return folder / "nf4"


def write_adapter(base: Path, folder: Path, rank: int, provenance: Mapping[str, object] | None) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(rank)
        made = get_peft_model(load_quantized(base, device="cpu"), LoraConfig(r=rank, target_modules="all-linear"))
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    made.save_pretrained(str(folder))
    if provenance is not None:
        (folder / "qlora.json").write_text(json.dumps(provenance))
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("serving"), 3)


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path) -> dict[str, Path]:
    recorded = {"quantized_base_digest": base_digest(base_folder)}
    return {
        name: write_adapter(base_folder, base_folder.parent / name, rank, recorded) for name, rank in ADAPTERS.items()
    }


@pytest.fixture(scope="session")
def served(base_folder: Path, adapter_folders: dict[str, Path]) -> Iterator[Served]:
    sources = [AdapterSource(name, folder) for name, folder in adapter_folders.items()]
    with open_served(base_folder, sources, base_name="base", precision="float32", device="cpu") as opened:
        yield opened


@contextmanager
def serve(served: Served, limits: Limits | None = None, token: str | None = None) -> Iterator[ModelServer]:
    """A server on a free port of loopback, in a thread of this process."""
    environment = {} if token is None else {"QLORA_SERVE_TOKEN": token}
    server = open_model_server(served, host="127.0.0.1", port=0, environment=environment, limits=limits)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while send(server.url, "GET", "/../health").status != 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


class Reply:
    """Status, headers and body of an answer."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of every server-sent event before [DONE]."""
        lines = [line[6:] for line in self.body.decode().split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def send(url: str, method: str, path: str, body: Any = None, **headers: str) -> Reply:
    parts = urlsplit(url)
    target = "/health" if path == "/../health" else f"{parts.path}{path}"
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, raw, {"Content-Type": "application/json", **given})
        answer = connection.getresponse()
        return Reply(answer.status, dict(answer.headers), answer.read())
    finally:
        connection.close()


Call = Callable[..., Reply]
Answering = Callable[..., AbstractContextManager[ModelServer]]


@pytest.fixture(scope="session")
def server(served: Served) -> Iterator[ModelServer]:
    with serve(served) as running:
        yield running


@pytest.fixture(scope="session")
def ask(server: ModelServer) -> Call:
    """`ask("/chat/completions", model=..., messages=...)`: a POST to the shared server."""

    def do(path: str, **body: Any) -> Reply:
        return send(server.url, "POST", path, body)

    return do


@pytest.fixture(scope="session")
def call() -> Call:
    """`call(url, method, path, body, Header=...)`; "/../health" is the one path outside /v1."""
    return send


@pytest.fixture(scope="session")
def answering() -> Answering:
    """`with answering(served, limits, token) as server:` a server of its own."""
    return serve
