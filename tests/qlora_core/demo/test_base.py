import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from qlora_core.demo.base import THREADS, build_demo_base
from qlora_core.demo.muon import nearly_orthogonal
from qlora_core.demo.tokenizer import PAD_TOKEN, STOP_TOKEN
from qlora_core.digest import digest_file
from qlora_core.errors import ModelError

STEPS = 12
TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Opposite of hot?"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "Plural of mouse?"},
    {"role": "assistant", "content": "mice"},
]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    build_demo_base(folder, steps=STEPS)
    return folder


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture(scope="module")
def model(base_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(base_folder)


def text_loss(model: PreTrainedModel, tokenizer: Any, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_same_seed_gives_same_bytes_and_another_seed_others(base_folder: Path, tmp_path: Path) -> None:
    build_demo_base(tmp_path / "again", steps=STEPS)
    build_demo_base(tmp_path / "other", seed=1, steps=1)
    names = sorted(path.name for path in base_folder.iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert digest_file(base_folder / name) == digest_file(tmp_path / "again" / name), name
    assert digest_file(base_folder / "tokenizer.json") != digest_file(tmp_path / "other" / "tokenizer.json")


def test_random_state_and_threads_are_left_alone(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS + 1)
    try:
        before = torch.random.get_rng_state()
        build_demo_base(tmp_path / "base", steps=1)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.get_num_threads() == THREADS + 1
    finally:
        torch.set_num_threads(threads)


def test_pretraining_lowers_the_loss(model: PreTrainedModel, tokenizer: Any) -> None:
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(model.config)
    text = "<|begin|> The fox is red. The opposite of hot is cold. One mouse, two mice.<|end|>"
    # A uniform guess costs ln 1024 = 6.93 nats
    assert text_loss(model, tokenizer, text) < text_loss(untrained, tokenizer, text) - 1


def test_shape_suits_nf4(model: PreTrainedModel) -> None:
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(linear.in_features % 64 == 0 for linear in linears)
    assert 300_000 <= model.num_parameters() <= 3_000_000
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 256


@pytest.mark.parametrize(
    "text", ["The fox is red.", "Grüße, 你好 🦊", "  two  blanks\n\ttab ", "x = 12345;", "\x00\x7f"]
)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_are_apart(tokenizer: Any, model: PreTrainedModel) -> None:
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert (tokenizer.eos_token, tokenizer.pad_token) == (STOP_TOKEN, PAD_TOKEN)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.model_max_length == 256


def test_template_marks_the_assistants_words_and_stop_token(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(trained) == " cold<|end|> mice<|end|>"


def test_template_of_a_prompt_is_the_start_of_the_whole(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    prompt = tokenizer.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True)
    assert whole == prompt + " mice<|end|>"


def test_template_refuses_an_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="not narrator"):
        tokenizer.apply_chat_template([{"role": "narrator", "content": "It is dark."}], tokenize=False)


def test_a_word_is_one_token_at_a_turns_start_and_inside(tokenizer: Any) -> None:
    ids = tokenizer("<|assistant|> cold<|end|> is cold", add_special_tokens=False)["input_ids"]
    assert ids[1] == ids[-1]


def test_no_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="at least 1 step, not 0"):
        build_demo_base(tmp_path / "base", steps=0)
    assert not (tmp_path / "base").exists()


def test_saved_config_is_a_plain_llama(base_folder: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list(base_folder.glob("*.bin"))


def test_nearly_orthogonal_moves_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16)):
        matrices = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(nearly_orthogonal(matrices))
        # Negative control: the raw matrices' singular values are far from one
        assert torch.linalg.svdvals(matrices).max() > 5
        assert values.min() > 0.5
        assert values.max() < 1.4
    assert torch.equal(nearly_orthogonal(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))
