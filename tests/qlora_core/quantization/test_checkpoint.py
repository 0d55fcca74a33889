import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_core.digest import digest_files
from qlora_core.errors import ModelError
from qlora_core.quantization.checkpoint import (
    check_checkpoint,
    checkpoint_dtype,
    checkpoint_files,
    is_quantized,
    max_positions,
    read_tensors,
    tokenizer_files,
)

MakeLlama = Callable[..., Path]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_whole_checkpoint_passes_as_one_file_and_in_shards(make_llama: MakeLlama) -> None:
    check_checkpoint(make_llama("single"))
    sharded = make_llama("sharded", shard_size="200KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 1
    check_checkpoint(sharded)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere does not exist"):
        check_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "has no config.json"), ("{", "no valid JSON"), ("[]", "holds a list"), ("{}", "names no model_type")],
)
def test_bad_config_is_refused(make_llama: MakeLlama, content: str | None, complaint: str) -> None:
    folder = make_llama()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=complaint):
        check_checkpoint(folder)


def test_folder_without_weights_is_refused(make_llama: MakeLlama) -> None:
    folder = make_llama()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights .*no \*\.safetensors file"):
        check_checkpoint(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_the_way_out(make_llama: MakeLlama, name: str) -> None:
    folder = make_llama()
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ModelError, match=rf"{name}, a pickle.*save_pretrained\('{folder}-safetensors'\)"):
        check_checkpoint(folder)


def test_pickle_beside_safetensors_is_left_alone(make_llama: MakeLlama) -> None:
    folder = make_llama()
    (folder / "training_args.bin").write_bytes(b"never read")
    check_checkpoint(folder)
    assert "training_args.bin" not in checkpoint_files(folder)


@pytest.mark.parametrize("kept", [4, 100, -1])
def test_truncated_safetensors_is_named(make_llama: MakeLlama, kept: int) -> None:
    path = make_llama() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"model\.safetensors is truncated or damaged"):
        check_checkpoint(path.parent)


def test_longer_safetensors_is_named(make_llama: MakeLlama) -> None:
    path = make_llama() / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ModelError, match="truncated or damaged: its tensors end at byte"):
        check_checkpoint(path.parent)


def test_damaged_header_is_named(make_llama: MakeLlama) -> None:
    path = make_llama() / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype":"F32"', b'"dtype":"F3?"', 1))
    with pytest.raises(ModelError, match=r"entry of tensor .* cannot be read"):
        check_checkpoint(path.parent)
    path.write_bytes(data.replace(b"data_offsets", b"data_0ffsets", 1))
    with pytest.raises(ModelError, match=r"entry of tensor .* cannot be read"):
        check_checkpoint(path.parent)


def test_missing_shard_is_named(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="200KB")
    shard = max(folder.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ModelError, match=f"1 are missing: {shard.name}"):
        check_checkpoint(folder)


def test_index_that_misplaces_a_tensor_is_refused(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="200KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = min(index["weight_map"].values())
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"places model\.layers\.9\.mlp\.up_proj\.weight"):
        check_checkpoint(folder)


def test_index_pointing_outside_the_folder_is_refused(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="200KB")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    with pytest.raises(ModelError, match="shards must be files of the same folder"):
        check_checkpoint(folder)


def test_quantized_base_is_refused(make_llama: MakeLlama) -> None:
    folder = make_llama()
    assert not is_quantized(folder)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    assert is_quantized(folder)
    with pytest.raises(ModelError, match=r"already quantized \(gptq\)"):
        check_checkpoint(folder)


def test_unsupported_dtype_is_named(make_llama: MakeLlama) -> None:
    with pytest.raises(ModelError, match=r"is stored as F64; float32, float16, bfloat16"):
        check_checkpoint(make_llama(dtype=torch.float64))


def test_dtype_is_the_one_that_holds_every_weight(make_llama: MakeLlama) -> None:
    folder = make_llama(dtype=torch.bfloat16)
    assert checkpoint_dtype(read_tensors(folder)) == "bfloat16"
    (folder / "model.safetensors").unlink()
    save_file({"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}, folder / "model.safetensors")
    assert checkpoint_dtype(read_tensors(folder)) == "float32"


def test_identity_is_weights_and_config_and_nothing_else(make_llama: MakeLlama) -> None:
    folder = make_llama(shard_size="200KB")
    files = checkpoint_files(folder)
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < files.keys()
    before = digest_files(files)
    (folder / "README.md").write_text("words")
    assert digest_files(checkpoint_files(folder)) == before
    edit_config(folder, rms_norm_eps=1e-3)
    assert digest_files(checkpoint_files(folder)) != before


def test_tokenizer_files_are_found_or_missed(make_llama: MakeLlama) -> None:
    folder = make_llama()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    found = tokenizer_files(folder)
    assert {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/tool.jinja"} <= found.keys()
    for path in found.values():
        path.unlink()
    with pytest.raises(ModelError, match="has no tokenizer files"):
        tokenizer_files(folder)


def test_max_positions_is_read_wherever_the_config_keeps_it(make_llama: MakeLlama) -> None:
    folder = make_llama()
    assert max_positions(folder) == 64
    edit_config(folder, max_position_embeddings=None, text_config={"max_position_embeddings": 32})
    assert max_positions(folder) == 32
    edit_config(folder, text_config=None)
    with pytest.raises(ModelError, match="names no max_position_embeddings"):
        max_positions(folder)


def test_header_gives_shapes_and_sizes(make_llama: MakeLlama) -> None:
    tensors = read_tensors(make_llama(shard_size="200KB"))
    found = tensors["model.layers.1.mlp.down_proj.weight"]
    assert (found.dtype, found.shape, found.size_bytes) == ("F32", (64, 172), 64 * 172 * 4)


def test_checking_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qlora_core.quantization.checkpoint; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
