"""Writes Llama-shaped checkpoints of random bfloat16 weights, a shard at a time, for benchmarks of any size.

No model of the full size is ever in memory. The weights are normal with a deviation of 0.02, as models begin.
"""

import json
from dataclasses import dataclass
from pathlib import Path

LAYERS_A_SHARD = 7


@dataclass(frozen=True)
class LlamaShape:
    """What decides a Llama's tensors. `key_value_heads` share the query heads among them."""

    hidden: int
    intermediate: int
    vocabulary: int
    layers: int
    heads: int
    key_value_heads: int

    @property
    def key_value_width(self) -> int:
        """Out features of the k and v projections."""
        return self.hidden // self.heads * self.key_value_heads


TWO_BILLION = LlamaShape(2048, 8192, 32_000, 28, 16, 16)
EIGHT_BILLION = LlamaShape(4096, 14_336, 128_256, 32, 32, 8)
"""The shape of Llama 3 8B (its config.json)."""


def write_checkpoint(folder: Path, shape: LlamaShape) -> int:
    """Write the checkpoint into the new `folder`; returns the number of its parameters."""
    from transformers import LlamaConfig

    from qlora_core.demo.tokenizer import train_tokenizer

    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=8192, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    train_tokenizer(["a few words"], vocab_size=300, max_tokens=512).save_pretrained(str(folder))
    places = {}
    parameters = 0
    for number, shapes in enumerate(_shards(shape)):
        name = f"model-{number:05}.safetensors"
        parameters += _write_shard(folder / name, shapes)
        places |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return parameters


def _shards(shape: LlamaShape) -> list[dict[str, tuple[int, ...]]]:
    hidden, wide, narrow = shape.hidden, shape.intermediate, shape.key_value_width
    ends = {"model.embed_tokens.weight": (shape.vocabulary, hidden), "lm_head.weight": (shape.vocabulary, hidden)}
    shards: list[dict[str, tuple[int, ...]]] = [{**ends, "model.norm.weight": (hidden,)}]
    for layer in range(shape.layers):
        if layer % LAYERS_A_SHARD == 0:
            shards.append({})
        prefix = f"model.layers.{layer}"
        shards[-1] |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        shards[-1] |= {f"{prefix}.self_attn.{name}_proj.weight": (narrow, hidden) for name in "kv"}
        shards[-1] |= {f"{prefix}.mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
        shards[-1] |= {f"{prefix}.mlp.down_proj.weight": (hidden, wide)}
        norms = ("input_layernorm", "post_attention_layernorm")
        shards[-1] |= {f"{prefix}.{name}.weight": (hidden,) for name in norms}
    return shards


def _write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    import torch

    from qlora_core.quantization.safetensors_file import StreamedFile

    generator = torch.Generator().manual_seed(len(path.name))
    parameters = 0
    with StreamedFile(path, shapes) as file:
        for name, shape in shapes.items():
            file.add(name, torch.randn(shape, generator=generator).mul_(0.02).bfloat16())
            parameters += torch.Size(shape).numel()
        file.finish()
    return parameters
