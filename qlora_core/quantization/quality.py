"""The quality report of a quantized base: what four bits cost it, layer by layer, in perplexity, and by format.

Runs the full-precision base with the stored weights, and with those of every other format, in the place of its own: one
model in memory, whatever the number of formats. Knows nothing of how the checkpoint was quantized or published.
"""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from qlora_core.config.quantize import QuantizeConfig
from qlora_core.errors import ConfigError, ModelError, StoreError
from qlora_core.evaluation.statistics.bootstrap import Estimate, percentile_interval, ratio_interval, resample_weights
from qlora_core.model.base import load_plain
from qlora_core.model.perplexity import document_losses
from qlora_core.progress import progress_bar
from qlora_core.quantization.blockwise import QuantizedTensor, quantize_tensor
from qlora_core.quantization.checkpoint import check_checkpoint
from qlora_core.quantization.publish import quantize_folder
from qlora_core.quantization.quality_inputs import QualityInputs, check_memory, read_inputs
from qlora_core.quantization.quality_outputs import output_errors
from qlora_core.quantization.quality_weights import OUTLIER_FACTOR, LayerWeights, WeightError, measure, restore
from qlora_core.quantization.quantize import REPORT_FILE

QUALITY_JSON = "quality/quality.json"
QUALITY_PAGE = "quality/quality.html"
FORMATS = {"nf4": "NF4", "e2m1": "FP4 (E2M1)", "fp4": "FP4 (bitsandbytes)", "int4": "Int4"}
BOOTSTRAP = {"confidence": 0.95, "resamples": 2000, "seed": 0}
_FORMAT_SETTINGS = {"type", "blocksize", "double_quant"}
logger = logging.getLogger(__name__)

Losses = Sequence[tuple[float, int]]


def quantize_with_quality(
    source: str,
    target: Path,
    config: QuantizeConfig,
    text_file: Path,
    calibration_file: Path | None = None,
    *,
    device: str | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`quantize_folder`, then `write_quality`; returns the quantization.json and the quality.json.

    Texts and memory are checked before anything is quantized. Where `target` is a checkpoint in the same format
    already, only its quality report is made, so that a report that failed, or another text, costs no quantizing.

    Raises:
        ConfigError: `source` is no local folder, or `target` exists and is something else.
        And what `read_inputs`, `check_memory`, `quantize_folder` and `write_quality` raise.
    """
    if "://" in source:
        raise ConfigError(f"a quality report runs the base, which must be a folder of this machine, not {source}")
    base = Path(source)
    check_checkpoint(base)
    inputs = read_inputs(base, text_file, calibration_file)
    check_memory(base, device=device)
    made = _earlier(target, config) or quantize_folder(base, target, config)
    return made, write_quality(inputs, base, target, config, device=device)


def write_quality(
    inputs: QualityInputs, source: Path, quantized: Path, config: QuantizeConfig, *, device: str | None = None
) -> dict[str, Any]:
    """Measure `quantized`, which was made from `source` with the settings `config`, against it; `device` None chooses.

    Writes `quality/quality.json` and `quality/quality.html` below `quantized`, over earlier ones. Returns the JSON:

    - `base`: `parameters`, `quantized_parameters`, `type`, `blocksize`, `double_quant`;
    - `text`: `file`, `sha256`, `documents`, `tokens` predicted, `window` in tokens; `calibration`: `origin` ("rows" or
      "text"), `file`, `sha256`, `rows`, `tokens`, `without_text` (records that gave none);
    - `full_precision` and `quantized`: `loss` (nats per token, documents apart) and `perplexity`; `quantized` and every
      format also `loss_difference` and `perplexity_difference` to full precision, each {`value`, `low`, `high`}: a
      paired bootstrap over documents, limits null for a single document; `confidence`, `resamples`, `seed` say how;
    - `formats`: each of `FORMATS` with and without double quantization at the stored blocksize: `bits_per_parameter`,
      `relative_l2`, `zeroed` (share of weights stored as 0 that are not 0), and the figures above; `stored` marks the
      checkpoint's own, measured on its files; the others are quantized here and put into the model;
    - `layers`: `name`, `shape`, `relative_l2`, `max_error`, `outlier_blocks` (a share, by `outlier_factor`: see
      `OUTLIER_FACTOR`), `zeroed`, `output_relative_l2` (see `output_errors`);
    - `device`, `precision` of the arithmetic, `seconds`.

    Raises:
        ModelError: the base does not fit into memory, or `quantized` is no checkpoint made from it.
        EvaluationError: a loss is not finite.
        StoreError: the disk refuses.
    """
    started = time.monotonic()
    check_memory(source, device=device)
    model = load_plain(source, device=device)
    layers = LayerWeights(model, source, quantized, config)
    full = _losses(model, inputs)
    outputs = output_errors(model, layers, inputs.calibration.rows)
    errors = _put_weights(layers, "Comparing layers", lambda name, weight: layers.stored(name))
    _check_origin(quantized, errors)
    own = {**_format_row(errors, full, _losses(model, inputs)), "stored": True}
    formats = _measure_formats(model, layers, inputs, config, full, own)
    sizes = {"parameters": layers.parameters, "quantized_parameters": _whole(errors).weights}
    quality = {
        "base": {**sizes, **config.model_dump(include=_FORMAT_SETTINGS)},
        **_facts_of(inputs),
        "full_precision": _loss_and_perplexity(full),
        "quantized": {name: own[name] for name in ("loss", "perplexity", "loss_difference", "perplexity_difference")},
        "formats": formats,
        "layers": [_layer_row(name, layers, errors[name], outputs[name]) for name in layers],
        "outlier_factor": OUTLIER_FACTOR,
        **BOOTSTRAP,
        "device": str(model.device),
        "precision": str(model.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - started, 3),
    }
    _write(quality, quantized)
    return quality


def _earlier(target: Path, config: QuantizeConfig) -> dict[str, Any] | None:
    """The quantization.json of a finished checkpoint in the format of `config`; None where `target` is none."""
    path = target / REPORT_FILE
    if not path.is_file():
        return None
    made = json.loads(path.read_text(encoding="utf-8"))
    wanted = config.model_dump(include=_FORMAT_SETTINGS)
    return made if all(made.get(name) == value for name, value in wanted.items()) else None


def _check_origin(quantized: Path, errors: Mapping[str, WeightError]) -> None:
    """Weights other than those that were quantized would give other errors than quantizing wrote down."""
    path = quantized / REPORT_FILE
    recorded = {layer["name"]: layer["relative_l2"] for layer in json.loads(path.read_text(encoding="utf-8"))["layers"]}
    for name, error in errors.items():
        if name not in recorded or not math.isclose(error.relative_l2, recorded[name], rel_tol=1e-3, abs_tol=1e-6):
            raise ModelError(
                f"{quantized}: the error of {name} is {error.relative_l2:.6f}, {path.name} has "
                f"{recorded.get(name, 'none')}: it was made from other weights; quantize this base to a new folder"
            )


def _put_weights(
    layers: LayerWeights, what: str, quantize: Callable[[str, Any], QuantizedTensor]
) -> dict[str, WeightError]:
    """Put what `quantize(name, source weight)` stands for into the loaded model, layer by layer; the error of each."""
    errors: dict[str, WeightError] = {}
    with progress_bar(what, len(layers.names)) as advance:
        for name in layers:
            weight = layers.source(name)
            quantized = quantize(name, weight)
            restored = restore(quantized)
            errors[name] = measure(weight, quantized, restored)
            layers.loaded(name).copy_(restored)
            advance(1)
    return errors


def _measure_formats(
    model: PreTrainedModel,
    layers: LayerWeights,
    inputs: QualityInputs,
    config: QuantizeConfig,
    full: Losses,
    own: Mapping[str, Any],
) -> list[dict[str, Any]]:
    rows = []
    for kind, label in FORMATS.items():
        for double_quant in (True, False):
            row: Mapping[str, Any] = own
            if (kind, double_quant) != (config.type, config.double_quant):
                settings = {"type": kind, "blocksize": config.blocksize, "double_quant": double_quant}
                quantize = partial(quantize_tensor, **settings)
                errors = _put_weights(layers, f"Trying {label}", lambda name, weight, how=quantize: how(weight))
                row = {**_format_row(errors, full, _losses(model, inputs)), "stored": False}
            rows.append({"type": kind, "label": label, "double_quant": double_quant, **row})
            logger.info(
                "Quality: %s%s: relative L2 %.4f, perplexity %.4f",
                label, " with double quantization" if double_quant else "", row["relative_l2"], row["perplexity"],
            )  # fmt: skip
    return rows


def _losses(model: PreTrainedModel, inputs: QualityInputs) -> list[tuple[float, int]]:
    return document_losses(model, inputs.documents, window=inputs.window)


def _format_row(errors: Mapping[str, WeightError], full: Losses, losses: Losses) -> dict[str, Any]:
    whole = _whole(errors)
    return {
        "bits_per_parameter": whole.bits_per_parameter,
        "relative_l2": whole.relative_l2,
        "zeroed": whole.zeroed / whole.nonzero if whole.nonzero else 0.0,
        **_loss_and_perplexity(losses),
        **compare_losses(full, losses),
    }


def _whole(errors: Mapping[str, WeightError]) -> WeightError:
    return sum(errors.values(), WeightError())


def _layer_row(name: str, layers: LayerWeights, error: WeightError, output_error: float) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(layers.loaded(name).shape),
        "relative_l2": error.relative_l2,
        "max_error": error.max_error,
        "outlier_blocks": error.outlier_blocks / error.blocks if error.blocks else 0.0,
        "zeroed": error.zeroed / error.nonzero if error.nonzero else 0.0,
        "output_relative_l2": output_error,
    }


def _facts_of(inputs: QualityInputs) -> dict[str, dict[str, Any]]:
    """What was measured on, without the tokens themselves."""
    text = {"file": inputs.file, "sha256": inputs.sha256, "documents": len(inputs.documents), "tokens": inputs.tokens}
    rows = inputs.calibration.rows
    calibration = {name: value for name, value in vars(inputs.calibration).items() if name != "rows"}
    return {
        "text": {**text, "window": inputs.window},
        "calibration": {**calibration, "rows": len(rows), "tokens": sum(len(row) for row in rows)},
    }


def _loss_and_perplexity(losses: Losses) -> dict[str, float]:
    loss = math.fsum(nats for nats, _ in losses) / sum(tokens for _, tokens in losses)
    return {"loss": loss, "perplexity": math.exp(loss)}


def compare_losses(full: Losses, other: Losses) -> dict[str, dict[str, float | None]]:
    """Loss and perplexity of `other` less those of `full`, with intervals; both give (nats, tokens) per document.

    Documents are drawn with replacement, the same ones for both, and tokens weigh alike. A single document has no
    interval: its limits are None. Raises EvaluationError for a loss that is not finite.
    """
    pairs = np.array([(a, b, n) for (a, n), (b, _) in zip(full, other, strict=True) if n], dtype=np.float64)
    nats, other_nats, tokens = pairs.T
    loss = ratio_interval(other_nats - nats, tokens, **BOOTSTRAP)
    draws = [
        np.exp((weights @ other_nats) / (weights @ tokens)) - np.exp((weights @ nats) / (weights @ tokens))
        for weights in resample_weights(len(pairs), resamples=BOOTSTRAP["resamples"], seed=BOOTSTRAP["seed"])
    ]
    value = float(np.exp(other_nats.sum() / tokens.sum()) - np.exp(nats.sum() / tokens.sum()))
    perplexity = Estimate(value, *percentile_interval(np.concatenate(draws), BOOTSTRAP["confidence"]))
    found = {"loss_difference": loss, "perplexity_difference": perplexity}
    if len(pairs) < 2:
        return {name: {"value": one.value, "low": None, "high": None} for name, one in found.items()}
    return {name: one._asdict() for name, one in found.items()}


def _write(quality: Mapping[str, Any], folder: Path) -> None:
    from qlora_core.report.quality_page import quality_page  # matplotlib takes a while, and errors come before it

    page = quality_page(quality)
    try:
        (folder / QUALITY_JSON).parent.mkdir(exist_ok=True)
        (folder / QUALITY_JSON).write_text(json.dumps(quality, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        (folder / QUALITY_PAGE).write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise StoreError(f"cannot write the quality report to {folder}: {error.strerror}; free space there") from error
