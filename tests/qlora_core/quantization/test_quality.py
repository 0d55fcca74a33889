"""Every figure of the report against a plain float64 computation on a tiny random Llama with planted outliers."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError, DataError, EvaluationError, ModelError
from qlora_core.model.base import load_any
from qlora_core.model.perplexity import text_loss
from qlora_core.quantization.checkpoint import checkpoint_files
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.quality import compare_losses, quantize_with_quality, write_quality
from qlora_core.quantization.quality_inputs import Calibration, QualityInputs, check_memory, read_inputs

MakeLlama = Callable[..., Path]
CONFIG = QuantizeConfig()
DOCUMENTS = ["Once upon a time there was a fox.", "The fox met a hen; the hen was not glad at all.", "The end came."]
TEXT = "<|endoftext|>".join([*DOCUMENTS, "  ", "No hen was harmed, says the fox."])
ROWS = ["First the fox, then the hen.", "hens", "The other row of the same file."]
OUTLIER_LAYER = "model.layers.1.mlp.down_proj"  # 172 inputs: its blocks cross rows, and the last is whole

E2M1 = [value / 6 for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]  # OCP MX specification 1.0, table of FP4
BITSANDBYTES_FP4 = [0, 0.0052083333, 0.16666667, 0.25, 0.33333333, 0.5, 0.66666667, 1]  # the comment in its CUDA kernel
# Dettmers et al. 2023, appendix E
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
VALUES = {
    "nf4": NF4,
    "e2m1": [*E2M1, *(-value for value in E2M1)],
    "fp4": [*BITSANDBYTES_FP4, *(-value for value in BITSANDBYTES_FP4)],
    "int4": [level / 7 for level in range(-7, 8)],
}


def plant_outliers(folder: Path) -> None:
    """Weights far beyond the rest, in two blocks of one layer."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    flat = weights[f"{OUTLIER_LAYER}.weight"].view(-1)
    flat[70] = 8.0
    flat[64 * 100 + 63] = -9.0
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def source(shared_llama: Path) -> Path:
    plant_outliers(shared_llama)
    return shared_llama


@pytest.fixture(scope="module")
def inputs(source: Path, tmp_path_factory: pytest.TempPathFactory) -> QualityInputs:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text(TEXT)
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    return read_inputs(source, folder / "text.txt", folder / "rows.jsonl")


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "nf4"
    quantize_folder(source, folder, CONFIG)
    return folder


@pytest.fixture(scope="module")
def quality(source: Path, stored: Path, inputs: QualityInputs) -> dict[str, Any]:
    return write_quality(inputs, source, stored, CONFIG, device="cpu")


@pytest.fixture(scope="module")
def weights(source: Path) -> dict[str, np.ndarray]:
    return {name: value.double().numpy() for name, value in load_file(source / "model.safetensors").items()}


@pytest.fixture(scope="module")
def decoded(stored: Path) -> dict[str, np.ndarray]:
    """The stored weights by layer in float64, from the file's tensors as the format describes them."""
    tensors = load_file(stored / "model.safetensors")
    suffix = ".weight.quant_state.bitsandbytes__nf4"
    layers = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
    return {layer: decode({key: value.numpy() for key, value in tensors.items()}, layer) for layer in layers}


def decode(tensors: dict[str, np.ndarray], layer: str) -> np.ndarray:
    name = f"{layer}.weight"
    state = json.loads(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())
    nested_absmax = tensors[f"{name}.nested_absmax"].astype(np.float64)
    codes = tensors[f"{name}.absmax"]
    absmax = tensors[f"{name}.nested_quant_map"].astype(np.float64)[codes]
    absmax = absmax * np.repeat(nested_absmax, 256)[: codes.size] + state["nested_offset"]
    packed = tensors[name].reshape(-1)
    nibbles = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: math.prod(state["shape"])]
    values = tensors[f"{name}.quant_map"].astype(np.float64)[nibbles] * np.repeat(absmax, 64)[: nibbles.size]
    return values.reshape(state["shape"])


def float64_model(source: Path, replaced: dict[str, np.ndarray] | None = None) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    for name, weight in (replaced or {}).items():
        model.get_submodule(name).weight.data.copy_(torch.from_numpy(weight))
    return model


def plain_losses(model: Any, documents: Sequence[Sequence[int]]) -> list[tuple[float, int]]:
    """-ln p of each token but the first, document by document; all fit into the model's 64 positions."""
    found = []
    for ids in documents:
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append((-sum(log_p[at - 1, ids[at]].item() for at in range(1, len(ids))), len(ids) - 1))
    return found


def loss_of(losses: list[tuple[float, int]]) -> float:
    return sum(nats for nats, _ in losses) / sum(count for _, count in losses)


def is_outlier(block: np.ndarray) -> bool:
    largest = np.abs(block).argmax()
    others = np.delete(block, largest)
    return bool(abs(block[largest]) > 6 * math.sqrt((others**2).mean()))


def test_layers_equal_a_plain_computation(
    quality: dict[str, Any], weights: dict[str, np.ndarray], decoded: dict[str, np.ndarray]
) -> None:
    assert {layer["name"] for layer in quality["layers"]} == decoded.keys()
    for layer in quality["layers"]:
        exact, restored = weights[f"{layer['name']}.weight"], decoded[layer["name"]]
        error = restored - exact
        assert layer["shape"] == list(exact.shape)
        assert layer["relative_l2"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(exact), rel=1e-6)
        assert layer["max_error"] == pytest.approx(np.abs(error).max(), rel=1e-5)
        assert layer["zeroed"] == pytest.approx(((restored == 0) & (exact != 0)).sum() / (exact != 0).sum(), rel=1e-12)
        blocks = [exact.reshape(-1)[start : start + 64] for start in range(0, exact.size, 64)]
        assert layer["outlier_blocks"] == pytest.approx(sum(map(is_outlier, blocks)) / len(blocks), rel=1e-12)


def test_planted_outliers_are_found_and_zero_their_neighbours(quality: dict[str, Any]) -> None:
    found = {layer["name"]: layer["outlier_blocks"] for layer in quality["layers"]}
    assert found.pop(OUTLIER_LAYER) == pytest.approx(2 / (64 * 172 / 64))
    assert set(found.values()) == {0.0}, "no block of normal weights is an outlier"


def test_output_errors_equal_a_plain_computation(
    quality: dict[str, Any], source: Path, decoded: dict[str, np.ndarray], inputs: QualityInputs
) -> None:
    model = float64_model(source)
    errors = dict.fromkeys(decoded, 0.0)
    outputs = dict.fromkeys(decoded, 0.0)

    def add(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        errors[name] += (x @ (torch.from_numpy(decoded[name]) - weight).T).square().sum().item()
        outputs[name] += (x @ weight.T).square().sum().item()

    for name in decoded:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: add(name, args[0], module.weight.data)
        )
    for row in inputs.calibration.rows:
        with torch.no_grad():
            model(torch.tensor([row]))
    assert len(inputs.calibration.rows) == 3
    for layer in quality["layers"]:
        name = layer["name"]
        assert layer["output_relative_l2"] == pytest.approx(math.sqrt(errors[name] / outputs[name]), rel=1e-4), name


def test_perplexities_equal_a_plain_computation(
    quality: dict[str, Any], source: Path, decoded: dict[str, np.ndarray], inputs: QualityInputs
) -> None:
    full = plain_losses(float64_model(source), inputs.documents)
    quantized = plain_losses(float64_model(source, decoded), inputs.documents)
    assert quality["text"]["documents"] == 4
    assert quality["text"]["tokens"] == sum(count for _, count in full)
    for name, losses in (("full_precision", full), ("quantized", quantized)):
        assert quality[name]["loss"] == pytest.approx(loss_of(losses), rel=1e-5)
        assert quality[name]["perplexity"] == pytest.approx(math.exp(loss_of(losses)), rel=1e-5)
    difference = quality["quantized"]["loss_difference"]
    assert difference["value"] == pytest.approx(loss_of(quantized) - loss_of(full), abs=1e-5)
    assert difference["low"] < difference["value"] < difference["high"]


def test_quantized_perplexity_is_that_of_the_loaded_checkpoint(
    quality: dict[str, Any], stored: Path, source: Path
) -> None:
    for name, folder in (("full_precision", source), ("quantized", stored)):
        scored = text_loss(load_any(folder, device="cpu"), AutoTokenizer.from_pretrained(folder), TEXT)
        assert quality[name]["loss"] == pytest.approx(scored.loss, rel=1e-6)
        assert quality["text"]["tokens"] == scored.tokens


@pytest.mark.parametrize("kind", VALUES)
def test_format_equals_rounding_to_the_nearest_value(
    quality: dict[str, Any], weights: dict[str, np.ndarray], source: Path, inputs: QualityInputs, kind: str
) -> None:
    """Without double quantization a stored weight is its block's absmax times the nearest of the format's values."""
    row = next(row for row in quality["formats"] if row["type"] == kind and not row["double_quant"])
    layers = [layer["name"] for layer in quality["layers"]]
    rounded = {name: nearest(weights[f"{name}.weight"], np.array(VALUES[kind])) for name in layers}
    errors = sum(((rounded[name] - weights[f"{name}.weight"]) ** 2).sum() for name in layers)
    squares = sum((weights[f"{name}.weight"] ** 2).sum() for name in layers)
    assert row["relative_l2"] == pytest.approx(math.sqrt(errors / squares), rel=1e-4)
    assert row["loss"] == pytest.approx(
        loss_of(plain_losses(float64_model(source, rounded), inputs.documents)), rel=1e-3
    )
    assert row["bits_per_parameter"] == 4.5


def nearest(weight: np.ndarray, values: np.ndarray) -> np.ndarray:
    blocks = weight.reshape(-1, 64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    places = np.abs((blocks / absmax)[:, :, None] - values).argmin(axis=2)
    return (values[places] * absmax).reshape(weight.shape)


def test_double_quantization_costs_little_error_and_saves_a_third_of_a_bit(quality: dict[str, Any]) -> None:
    for kind in VALUES:
        double, single = (
            next(row for row in quality["formats"] if (row["type"], row["double_quant"]) == (kind, asked))
            for asked in (True, False)
        )
        # 4 + 8/64 + 32/(64*256), and what the short last block of absmax constants adds
        assert 4.127 <= double["bits_per_parameter"] < 4.14
        assert single["relative_l2"] < double["relative_l2"] < 1.01 * single["relative_l2"]


def test_formats_rank_on_normal_weights_as_is_known(make_llama: MakeLlama, tmp_path: Path) -> None:
    """Relative L2 on N(0,1) at blocksize 64: NF4 .0920, E2M1 .1057, Int4 .1076, bitsandbytes' fp4 .1220."""
    source, text = make_llama(hidden=128, intermediate=256), tmp_path / "text.txt"
    text.write_text(TEXT)
    _, quality = quantize_with_quality(str(source), tmp_path / "out", CONFIG, text, device="cpu")
    single = {row["type"]: row["relative_l2"] for row in quality["formats"] if not row["double_quant"]}
    assert sorted(single, key=lambda kind: single[kind]) == ["nf4", "e2m1", "int4", "fp4"]
    assert single == pytest.approx({"nf4": 0.0920, "e2m1": 0.1057, "int4": 0.1076, "fp4": 0.1220}, rel=0.01)
    assert quality["calibration"]["origin"] == "text"
    assert not any(layer["outlier_blocks"] for layer in quality["layers"])


@pytest.mark.parametrize("kind", ["nf4", "int4"])
def test_simulated_format_is_the_stored_one_to_the_bit(
    quality: dict[str, Any], source: Path, inputs: QualityInputs, tmp_path: Path, kind: str
) -> None:
    config = QuantizeConfig(type=kind, double_quant=kind == "int4")  # pyright: ignore[reportArgumentType]
    quantize_folder(source, tmp_path / "out", config)
    measured = write_quality(inputs, source, tmp_path / "out", config, device="cpu")
    own = next(row for row in measured["formats"] if row["stored"])
    simulated = next(row for row in quality["formats"] if row["label"] == own["label"] and not row["stored"])
    assert own["double_quant"] == simulated["double_quant"]
    assert {**own, "stored": False} == simulated


def test_checkpoint_with_a_report_still_loads_as_before(quality: dict[str, Any], stored: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stored, device_map={"": "cpu"})
    assert math.isfinite(model.train()(torch.tensor([[1, 40, 60]])).logits.sum().item())
    assert json.loads((stored / "quality" / "quality.json").read_text()) == quality
    assert not any("quality" in name for name in checkpoint_files(stored))


def test_transposed_weights_are_measured(tmp_path: Path, source: Path) -> None:
    """GPT-2 stores [in_features, out_features]; seen the wrong way round, the error would be that of other weights."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=64, n_embd=64, n_layer=1, n_head=2))
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    _, quality = quantize_with_quality(
        str(tmp_path / "base"), tmp_path / "out", CONFIG, tmp_path / "text.txt", device="cpu"
    )
    assert len(quality["layers"]) == 4
    for layer in quality["layers"]:
        assert layer["relative_l2"] == pytest.approx(0.092, abs=0.004)
        assert layer["output_relative_l2"] == pytest.approx(0.092, abs=0.03)


def test_interval_is_that_of_documents_drawn_again_for_both_models() -> None:
    full, other = [(30.0, 10), (80.0, 20), (0.0, 0), (12.0, 8)], [(33.0, 10), (81.0, 20), (0.0, 0), (15.0, 8)]
    found = compare_losses(full, other)
    scored = np.array([(a, b, n) for (a, n), (b, _) in zip(full, other, strict=True) if n])
    losses, perplexities = [], []
    for draw in np.random.default_rng(0).integers(3, size=(2000, 3)):
        nats, other_nats, tokens = scored[draw].sum(axis=0)
        losses.append(other_nats / tokens - nats / tokens)
        perplexities.append(math.exp(other_nats / tokens) - math.exp(nats / tokens))
    for name, draws, value in (
        ("loss_difference", losses, 7 / 38),
        ("perplexity_difference", perplexities, math.exp(129 / 38) - math.exp(122 / 38)),
    ):
        low, high = np.quantile(draws, [0.025, 0.975])
        assert found[name] == pytest.approx({"value": value, "low": low, "high": high}, rel=1e-9)


def test_equal_models_differ_by_nothing_and_one_document_has_no_interval() -> None:
    same = compare_losses([(30.0, 10), (80.0, 20)], [(30.0, 10), (80.0, 20)])
    assert same["loss_difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    alone = compare_losses([(30.0, 10)], [(33.0, 10)])
    assert alone["loss_difference"] == {"value": pytest.approx(0.3), "low": None, "high": None}
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        compare_losses([(30.0, 10)], [(math.nan, 10)])


class PageReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset") and value]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def read_page(folder: Path) -> tuple[PageReader, str]:
    html = (folder / "quality" / "quality.html").read_text(encoding="utf-8")
    reader = PageReader()
    reader.feed(html)
    return reader, html


def test_page_stands_alone_and_shows_the_figures(quality: dict[str, Any], stored: Path) -> None:
    reader, html = read_page(stored)
    assert reader.open == []
    assert reader.tags.count("img") == 3
    assert all(address.startswith("data:image/svg+xml;base64,") for address in reader.addresses)
    assert html.count("<tr") == 2 + 8 + 1 + len(quality["layers"])
    for value in (quality["full_precision"]["perplexity"], quality["quantized"]["perplexity"]):
        assert f"{value:,.4f}" in html
    for row in quality["formats"]:
        assert f"{row['relative_l2']:.4f}" in html


def test_names_from_outside_are_escaped(source: Path, stored: Path, tmp_path: Path, inputs: QualityInputs) -> None:
    attack = "<img src=x onerror=alert(1)>"
    hostile = QualityInputs(attack, inputs.sha256, inputs.documents[:1], inputs.window, inputs.calibration)
    shutil.copytree(stored, tmp_path / "out")
    write_quality(hostile, source, tmp_path / "out", CONFIG, device="cpu")
    reader, html = read_page(tmp_path / "out")
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert attack not in html
    assert "A single document gives no interval" in html
    assert all(address.startswith("data:") for address in reader.addresses)


def test_report_on_a_finished_checkpoint_quantizes_nothing_again(
    quality: dict[str, Any], source: Path, stored: Path, tmp_path: Path
) -> None:
    shutil.copytree(stored, tmp_path / "out")
    (tmp_path / "text.txt").write_text(TEXT * 2)
    before = (tmp_path / "out" / "model.safetensors").stat()
    made, again = quantize_with_quality(str(source), tmp_path / "out", CONFIG, tmp_path / "text.txt", device="cpu")
    after = (tmp_path / "out" / "model.safetensors").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert made == json.loads((stored / "quantization.json").read_text())
    assert again["text"]["tokens"] > quality["text"]["tokens"]
    with pytest.raises(ConfigError, match="exists already"):
        quantize_with_quality(
            str(source), tmp_path / "out", QuantizeConfig(type="fp4"), tmp_path / "text.txt", device="cpu"
        )


def test_checkpoint_of_other_weights_is_refused(
    make_llama: MakeLlama, stored: Path, tmp_path: Path, inputs: QualityInputs
) -> None:
    shutil.copytree(stored, tmp_path / "out")
    with pytest.raises(ModelError, match=r"the error of model\.layers\.0\..* was made from other weights"):
        write_quality(inputs, make_llama("others", seed=8), tmp_path / "out", CONFIG, device="cpu")
    with pytest.raises(ModelError, match=r"shape .* it was made from another base"):
        write_quality(inputs, make_llama("wider", intermediate=96), tmp_path / "out", CONFIG, device="cpu")


@pytest.mark.parametrize("text", ["", " \n<|endoftext|> \n", "too short"])
def test_text_that_is_too_short_is_refused_before_anything_is_quantized(
    source: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(DataError, match=r"text\.txt has \d+ tokens to predict; a quality report needs at least 100"):
        quantize_with_quality(str(source), tmp_path / "out", CONFIG, tmp_path / "text.txt", device="cpu")
    assert not (tmp_path / "out").exists()


def test_calibration_rows_without_text_are_refused_with_their_fields(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "rows.jsonl").write_text('{"label": 3, "text": ""}\n{"label": 4}\n')
    with pytest.raises(DataError, match=r"none of the first 2 records has a text; its fields are \['label', 'text'\]"):
        read_inputs(source, tmp_path / "text.txt", tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match="missing"):
        read_inputs(source, tmp_path / "text.txt", tmp_path / "missing.jsonl")


def test_calibration_takes_texts_and_conversations_and_counts_the_rest(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    rows = [{"instruction": "Who?", "output": "The fox."}, {"text": "A hen."}, {"instruction": "Why?", "output": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no JSON\n")
    found: Calibration = read_inputs(source, tmp_path / "text.txt", tmp_path / "rows.jsonl").calibration
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert [tokenizer.decode(row, skip_special_tokens=True) for row in found.rows] == [
        "Who?The fox.",
        "A hen.",
    ]
    assert found.without_text == 2


def test_long_calibration_rows_are_cut_into_windows(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 2000)
    found = read_inputs(source, tmp_path / "text.txt")
    assert found.window == 64
    assert {len(row) for row in found.calibration.rows} == {64}
    assert len(found.calibration.rows) == 128


def test_base_that_does_not_fit_is_refused_with_the_bytes_it_takes(source: Path) -> None:
    parameters = sum(value.numel() for value in load_file(source / "model.safetensors").values())
    needed = 4 * parameters + 4096 * 128 * (4 + 8) + 3 * 4 * 64 * 172
    check_memory(source, device="cpu", available_bytes=needed)
    with pytest.raises(ModelError, match=rf"at least {needed:,} bytes on cpu .*, and {needed - 1:,} are free"):
        check_memory(source, device="cpu", available_bytes=needed - 1)


def test_base_that_is_no_local_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be a folder of this machine, not s3://bucket/"):
        quantize_with_quality("s3://bucket/v1/stage/base/0", tmp_path / "out", CONFIG, tmp_path / "text.txt")
