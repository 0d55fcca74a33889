"""An adapter and its base to one standalone checkpoint, proven to be what the adapter is on its base, or not written.

First what the 4-bit grid would swallow is predicted; then each way of merging is written beside the target, loaded from
there, and measured against the adapter on its base. The nearest that keeps every threshold of `MergeConfig` is put in
place with its certificate. If none does, the certificate says so, and no checkpoint stands where it was asked for.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open

from qlora_core.adapters.adapter_folder import AdapterFolder, adapter_digest, open_adapter
from qlora_core.adapters.calibrated import MomentShelf, calibrated_nf4
from qlora_core.adapters.deltas import LayerDelta, as_json, delta_norm, predict, projection, read_effects
from qlora_core.adapters.dense_checkpoint import closest_dtype, write_dense
from qlora_core.adapters.merge_source import DequantizedSource, MergeBase, open_merge_base
from qlora_core.adapters.merged import CERTIFICATE_FILE, CHECKPOINT_KEY, checkpoint_digest
from qlora_core.adapters.on_base import check_on_base, golden_prompts_of
from qlora_core.adapters.parity import TokenRows, failures, measure
from qlora_core.adapters.samples import sampled_rows, text_rows
from qlora_core.config.merge import MergeConfig
from qlora_core.digest import digest_files, digest_json
from qlora_core.errors import ConfigError, ModelError
from qlora_core.model.adapter import PARENTS_KEY, Golden, golden_logits, write_golden
from qlora_core.model.adapter_set import AdapterSet, NamedAdapter, attached_adapters
from qlora_core.model.base import load_any
from qlora_core.model.loss import max_positions_of
from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into, from_stored_tensors, quantize_tensor
from qlora_core.quantization.blueprint import PlannedTensor
from qlora_core.quantization.checkpoint import checkpoint_files, is_quantized, read_tensors
from qlora_core.quantization.quantize import quantize_checkpoint
from qlora_core.quantization.tensor_source import LocalSource, TensorSource

_NAME = "adapter"


@dataclass(frozen=True)
class MergeRequest:
    """What is to be merged where. `original`: the checkpoint the base was quantized from.

    `text`: held-out text of the adapter's task to measure on; `calibration`: other such text for calibrated rounding.
    Without them the adapter's own samples serve, from different seeds.
    """

    adapter: Path
    base: Path
    out: Path
    target: str
    original: Path | None = None
    text: Path | None = None
    calibration: Path | None = None


@dataclass(frozen=True)
class _Work:
    """Everything a candidate is made and measured with; `calibration` gives its rows when they are first needed."""

    base: MergeBase
    reference: AdapterSet
    rows: TokenRows
    calibration: Callable[[], TokenRows]
    prompts: list[list[int]]
    config: MergeConfig
    target: str


def merge(request: MergeRequest, config: MergeConfig) -> dict[str, Any]:
    """Merge, prove and publish; returns {"gain_retained", "kl", "certificate" (path), "checkpoint", "chosen", ...}.

    Target `16bit` goes into the dequantized base, which the adapter was trained on, as float16 or bfloat16, whichever
    is closer. `nf4` tries the config's candidates. Memory: the loaded 4-bit base and one candidate; weights are
    streamed.

    Raises:
        ConfigError: `out` is taken, or an unknown target. ModelError: the adapter does not fit; or no candidate keeps
            the thresholds, with the figures; the certificate of the refusal is then `<out>.refused.json`.
    """
    _check_request(request)
    adapter = open_adapter(request.adapter)
    if adapter.provenance.get(PARENTS_KEY):
        raise ModelError(
            f"{request.adapter} was trained on top of other adapters; fuse them first with `qlora compose`"
        )
    check_on_base(request.base, [adapter])
    request.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=request.out.parent) as scratch:
        with _opened(request, adapter, config, Path(scratch)) as work:
            certificate, chosen = _choose(work, Path(scratch))
        certificate |= _origin(request, adapter)
        if chosen is None:
            _refuse(request, certificate)
        certificate |= {CHECKPOINT_KEY: checkpoint_digest(chosen)}
        text = json.dumps(certificate, indent=1, allow_nan=False)
        (chosen / CERTIFICATE_FILE).write_text(text + "\n", encoding="utf-8")
        if request.out.exists():
            request.out.rmdir()
        chosen.replace(request.out)
    return _result(request, certificate)


def _check_request(request: MergeRequest) -> None:
    if request.target not in ("16bit", "nf4"):
        raise ConfigError(f"target {request.target!r} is unknown; choose 16bit or nf4")
    if not is_quantized(request.base):
        raise ModelError(f"{request.base} is no 4-bit checkpoint; name the base that the adapter was trained on")
    if request.out.exists() and (not request.out.is_dir() or any(request.out.iterdir())):
        raise ConfigError(f"{request.out} exists and is not empty; name a new folder for the merged checkpoint")


@contextmanager
def _opened(request: MergeRequest, adapter: AdapterFolder, config: MergeConfig, scratch: Path) -> Iterator[_Work]:
    side = scratch / "side"
    side.mkdir()
    source = DequantizedSource(request.base, side, {"base": digest_files(checkpoint_files(request.base))})
    original = None if request.original is None else LocalSource(request.original)
    base = open_merge_base(source, original, adapter, config.max_shard_bytes)
    if request.target == "nf4" and base.config.type != "nf4":
        raise ModelError(f"the base is stored as {base.config.type}; an nf4 target needs an nf4 base")
    model = load_any(request.base)
    prompts = golden_prompts_of([request.adapter])
    with attached_adapters(model, [NamedAdapter(_NAME, request.adapter)]) as reference:
        limit = max_positions_of(model)

        def rows_of(text: Path | None, tokens: int, seed: int) -> TokenRows:
            if text is not None:
                return text_rows(request.base, text, limit)
            return sampled_rows(reference, _NAME, prompts, tokens=tokens, seed=seed)

        rows = rows_of(request.text, config.measured_tokens, config.seed + 1)
        calibration = cache(lambda: rows_of(request.calibration, config.calibration_tokens, config.seed))
        yield _Work(base, reference, rows, calibration, prompts, config, request.target)


def _choose(work: _Work, scratch: Path) -> tuple[dict[str, Any], Path | None]:
    """The certificate, and the folder of the candidate that is nearest to the adapter among those that pass."""
    predicted = {on: predict(work.base, on) for on in _bases(work)} if work.target == "nf4" else {}
    tried: list[dict[str, Any]] = []
    best: tuple[float, Path] | None = None
    for name in _candidates(work):
        folder = scratch / name
        entry = _attempt(work, name, folder, predicted)
        tried.append(entry)
        if entry["passed"] and (best is None or entry["kl"] < best[0]):
            if best is not None:
                shutil.rmtree(best[1])
            best = (entry["kl"], folder)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    chosen = None if best is None else best[1].name
    summary = {on: {"projection": projection(layers), "layers": as_json(layers)} for on, layers in predicted.items()}
    certificate = {
        "format": 1,
        "target": work.target,
        "verdict": "pass" if best else "fail",
        "chosen": chosen,
        "predicted": summary,
        "candidates": tried,
        "thresholds": work.config.model_dump(mode="json"),
        "measured_on": {"origin": work.rows.origin, "rows": len(work.rows.ids), "tokens": work.rows.tokens},
        "calibrated_on": _calibrated_on(work),
        "golden_prompts": work.prompts,
    }
    return certificate, None if best is None else best[1]


def _calibrated_on(work: _Work) -> dict[str, Any] | None:
    if not any(name.endswith("-calibrated") for name in _candidates(work)):
        return None
    return {"origin": work.calibration().origin, "tokens": work.calibration().tokens}


def _bases(work: _Work) -> list[str]:
    wanted = {name.partition("-")[0] for name in _candidates(work)}
    return [on for on in ("dequantized", "original") if on in wanted]


def _candidates(work: _Work) -> list[str]:
    if work.target == "16bit":
        return ["dequantized-16bit"]
    without = work.base.original is None
    found = [name for name in work.config.candidates if not (without and name.startswith("original"))]
    if not found:
        raise ConfigError(f"candidates {work.config.candidates} all need the original checkpoint; name it (--original)")
    return list(found)


def _attempt(work: _Work, name: str, folder: Path, predicted: dict[str, list[LayerDelta]]) -> dict[str, Any]:
    """Write one candidate, load it from there, measure it; an entry of the certificate's `candidates`."""
    on, _, rounding = name.partition("-")
    if rounding == "rtn":
        foreseen = projection(predicted[on])
        if delta_norm(predicted[on]) and foreseen < work.config.min_predicted_projection:
            reason = (
                f"not written: the grid would leave {foreseen:.3f} of the delta "
                f"(at least {work.config.min_predicted_projection:g} is asked for)"
            )
            return {"name": name, "passed": False, "failures": [reason], "predicted_projection": foreseen}
    about = _write(work, name, folder)
    merged = load_any(folder)
    figures = measure(work.reference, _NAME, merged, work.rows).figures()
    write_golden(folder, Golden(work.prompts, golden_logits(merged, work.prompts)))
    del merged
    layers = read_effects(work.base, _reader(work.base, folder))
    missed = failures(figures, layers, work.config, work.target)
    return {
        "name": name,
        "passed": not missed,
        "failures": missed,
        **figures,
        "projection": projection(layers),
        **about,
        "layers": as_json(layers),
    }


def _write(work: _Work, name: str, folder: Path) -> dict[str, Any]:
    on, _, rounding = name.partition("-")
    source = work.base.merged(on, {"merge": name, "settings": digest_json(work.config.model_dump(mode="json"))})
    if rounding == "16bit":
        dtype, errors = closest_dtype(source, work.base.blueprint.tensors)
        folder.mkdir()
        write_dense(work.base, source, folder, dtype)
        return {"dtype": str(dtype).removeprefix("torch."), "storage_error": errors}
    quantize_checkpoint(source, folder, work.base.config, quantizer=_quantizer(work, rounding))
    return {"type": work.base.config.type}


def _quantizer(work: _Work, rounding: str) -> Callable[[PlannedTensor, torch.Tensor], QuantizedTensor]:
    """Weights that the adapter leaves alone keep their stored bytes; the others are rounded as asked."""
    base, settings = work.base, work.base.config
    # Rounding the same values again would keep the codes and shift the nested absmax
    names = {module: name for module, name in base.changed.items() if base.adapter.factors(module).norm()}
    in_order = [tensor.name.removesuffix(".weight") for tensor in base.blueprint.tensors]
    widths = {name: base.source.stored(names[name]).shape[1] for name in in_order if name in names}
    shelf = MomentShelf(work.reference.base, lambda: _run(work), widths, work.config.hessian_bytes)
    own = {tensor.name: tensor.source for tensor in base.blueprint.tensors}

    def quantize(tensor: PlannedTensor, weight_oi: torch.Tensor) -> QuantizedTensor:
        module = tensor.name.removesuffix(".weight")
        stored = base.source.stored(own[tensor.name])
        if module not in names:
            return stored
        if rounding == "rtn":
            made = quantize_tensor(
                weight_oi, type=settings.type, blocksize=settings.blocksize, double_quant=settings.double_quant
            )
        else:
            made = calibrated_nf4(
                weight_oi.float().contiguous(),
                shelf.take(module),
                blocksize=settings.blocksize,
                double_quant=settings.double_quant,
                dampening=work.config.dampening,
            )
        return replace(made, dtype=stored.dtype)

    return quantize


def _run(work: _Work) -> None:
    with torch.inference_mode():
        for ids in work.calibration().ids:
            with work.reference.rows([_NAME]):
                work.reference.base(input_ids=torch.tensor([ids], device=work.reference.base.device), use_cache=False)


def _reader(base: MergeBase, folder: Path) -> Callable[[str], torch.Tensor]:
    """A module's weight as the written checkpoint holds it, float32 [o, i]."""
    stored = read_tensors(folder)
    written = {tensor.name.removesuffix(".weight"): tensor for tensor in base.blueprint.tensors}

    def read(module: str) -> torch.Tensor:
        tensor = written[module]
        parts: dict[str, torch.Tensor] = {}
        for name in [each for each in stored if each == tensor.written or each.startswith(f"{tensor.written}.")]:
            with safe_open(folder / stored[name].file, framework="pt") as file:
                parts[name] = file.get_tensor(name)
        if len(parts) == 1:
            value = parts[tensor.written].float()
            return value.T if tensor.transposed else value
        quantized = from_stored_tensors(tensor.written, parts)
        return dequantize_into(quantized, torch.empty(quantized.shape))

    return read


def _origin(request: MergeRequest, adapter: AdapterFolder) -> dict[str, Any]:
    original: TensorSource | None = None if request.original is None else LocalSource(request.original)
    return {
        "adapter_digest": adapter.digest,
        "base_digest": digest_files(checkpoint_files(request.base)),
        "quantized_base_digest": adapter.base_digest,
        "original_headers": None if original is None else digest_json(dict(original.identity)),
    }


def _refuse(request: MergeRequest, certificate: dict[str, Any]) -> NoReturn:
    path = request.out.with_name(f"{request.out.name}.refused.json")
    path.write_text(json.dumps(certificate, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    reasons = "; ".join(f"{entry['name']}: {', '.join(entry['failures'])}" for entry in certificate["candidates"])
    raise ModelError(
        f"no merged checkpoint was written, none keeps what the adapter does: {reasons}. Serve the adapter on its "
        f"4-bit base, merge to 16bit, or name the original checkpoint; the figures are in {path}"
    )


def _result(request: MergeRequest, certificate: dict[str, Any]) -> dict[str, Any]:
    chosen = next(entry for entry in certificate["candidates"] if entry["name"] == certificate["chosen"])
    kept = ("gain_retained", "gain_retained_interval", "kl", "top1_agreement", "projection", "loss", "gain")
    return {
        **{key: chosen[key] for key in kept},
        "certificate": str(request.out / CERTIFICATE_FILE),
        "checkpoint": str(request.out),
        "target": request.target,
        "chosen": certificate["chosen"],
        "dtype": chosen.get("dtype"),
        "adapter_digest": adapter_digest(request.adapter),
    }
