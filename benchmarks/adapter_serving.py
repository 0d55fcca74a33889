"""`qlora serve`'s endpoint asked for eight adapters at once, against the same requests one after another.

Both sides are the same server over the same 4-bit base, HTTP included; in turn, every answer is a batch of one row.
There are no figures unless both sides give the same texts. Answers have no early end, so that both make as many tokens.
"""

import http.client
import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import transformers

from benchmarks.multi_adapter import write_adapter, write_base
from benchmarks.timing import timed
from qlora_core.serving.admission import AdapterSource
from qlora_core.serving.served import Served, open_served
from qlora_core.serving.server import ModelServer, open_model_server

ADAPTERS = 8
NEW_TOKENS = 32
ROUNDS = 5
PROMPT = "Name three things that are red, and say why: "


def measure() -> dict[str, Any]:
    """Tokens per second of CPU and of wall time of both sides, the ratios, and the seconds of every round."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder, torch.compiler.set_stance("force_eager"):
        quantized = Path(folder) / "nf4"
        write_base(Path(folder) / "base", quantized)
        adapters = [write_adapter(quantized, Path(folder), number) for number in range(ADAPTERS)]
        sources = [AdapterSource(adapter.name, adapter.folder) for adapter in adapters]
        with open_served(quantized, sources, device="cpu", allow_unbound=True) as served, _running(served) as server:
            figures = _race(server, [adapter.name for adapter in adapters])
    return {"adapters": ADAPTERS, "new_tokens": NEW_TOKENS, "rounds": ROUNDS, **figures}


def _race(server: ModelServer, names: list[str]) -> dict[str, Any]:
    def together() -> list[str]:
        with ThreadPoolExecutor(ADAPTERS) as pool:
            return list(pool.map(lambda name: _ask(server.url, name), names))

    def in_turn() -> list[str]:
        return [_ask(server.url, name) for name in names]

    ways: dict[str, Callable[[], list[str]]] = {"one_batch": together, "in_turn": in_turn}
    if together() != in_turn():
        raise SystemExit("answers in one batch are not those in turn")
    seconds = {name: [timed(way) for _ in range(ROUNDS)] for name, way in ways.items()}
    made = ADAPTERS * NEW_TOKENS
    rates = {
        name: {
            "tokens_per_cpu_s": made / statistics.median(cpu for cpu, _ in taken),
            "tokens_per_wall_s": made / statistics.median(wall for _, wall in taken),
        }
        for name, taken in seconds.items()
    }
    ratio = {unit: rates["one_batch"][unit] / rates["in_turn"][unit] for unit in rates["one_batch"]}
    return {
        "rates": rates,
        "one_batch_over_in_turn": ratio,
        "largest_batch": server.engine.load.largest_batch,
        "seconds": seconds,
    }


def _ask(url: str, model: str) -> str:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)
    body = {"model": model, "prompt": PROMPT, "temperature": 0, "max_tokens": NEW_TOKENS, "logprobs": 0}
    connection.request("POST", f"{parts.path}/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = json.loads(connection.getresponse().read())
    connection.close()
    if reply["usage"]["completion_tokens"] != NEW_TOKENS:
        raise SystemExit(f"{model} stopped after {reply['usage']['completion_tokens']} of {NEW_TOKENS} tokens")
    return reply["choices"][0]["text"] + json.dumps(reply["choices"][0]["logprobs"]["tokens"])


@contextmanager
def _running(served: Served) -> Iterator[ModelServer]:
    server = open_model_server(served, host="127.0.0.1", port=0, environment={})
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
