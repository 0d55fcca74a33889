"""How near a merged checkpoint is to the adapter on its base, in what they answer, and whether that is near enough.

Knows loaded models and token rows, not how a checkpoint was made. Shapes: n counted tokens, v vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from qlora_core.adapters.deltas import LayerDelta, delta_norm, projection
from qlora_core.config.merge import MergeConfig
from qlora_core.errors import ModelError
from qlora_core.evaluation.statistics.bootstrap import ratio_interval
from qlora_core.model.adapter_set import AdapterSet

_TOKENS_AT_ONCE = 256
_CONFIDENCE = 0.95
_RESAMPLES = 1000


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids, none empty, each scored from its place `starts[i]` (at least 1) on."""

    ids: list[list[int]]
    starts: list[int]
    origin: str

    @property
    def tokens(self) -> int:
        """How many tokens are predicted."""
        return sum(max(0, len(row) - start) for row, start in zip(self.ids, self.starts, strict=True))


@dataclass
class Measured:
    """Sums over rows, nats: one loss a row for the base, the adapter on it, and the merged model; KL; agreements."""

    tokens: list[int] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    dynamic: list[float] = field(default_factory=list)
    merged: list[float] = field(default_factory=list)
    kl: float = 0.0
    agreed: int = 0

    def figures(self) -> dict[str, Any]:
        """Losses, KL and agreement per token; the gain, and the share of it that is left, with its interval.

        `gain_retained` = (base - merged) / (base - adapter), None where the adapter gains nothing on these rows.
        """
        tokens = sum(self.tokens)
        losses = {name: sum(getattr(self, name)) / tokens for name in ("base", "dynamic", "merged")}
        gain = losses["base"] - losses["dynamic"]
        figures: dict[str, Any] = {
            "tokens": tokens,
            "rows": len(self.tokens),
            "loss": losses,
            "gain": gain,
            "kl": self.kl / tokens,
            "top1_agreement": self.agreed / tokens,
            "gain_retained": None,
            "gain_retained_interval": None,
        }
        if gain > 0 and len(self.tokens) > 1:
            left = [base - merged for base, merged in zip(self.base, self.merged, strict=True)]
            whole = [base - dynamic for base, dynamic in zip(self.base, self.dynamic, strict=True)]
            found = ratio_interval(left, whole, confidence=_CONFIDENCE, resamples=_RESAMPLES, seed=0)
            figures |= {"gain_retained": found.value, "gain_retained_interval": [found.low, found.high]}
        return figures


def measure(reference: AdapterSet, adapter: str, merged: PreTrainedModel, rows: TokenRows) -> Measured:
    """Run base, adapter on base, and merged model over the same rows, one row at a time.

    KL is KL(adapter || merged) in nats, in float64 from the models' own logits, so that 1e-9 is still a number.

    Raises:
        ModelError: no token to predict, or logits that are not finite.
    """
    if not rows.tokens:
        raise ModelError("the rows to measure on have no token to predict; give a longer text")
    result = Measured()
    for ids, start in zip(rows.ids, rows.starts, strict=True):
        if len(ids) <= start:
            continue
        with reference.rows([None, adapter]):
            base, dynamic = _logits(reference.base, [ids, ids])
        logits = {"base": base, "dynamic": dynamic, "merged": _logits(merged, [ids])[0]}
        result.tokens.append(len(ids) - start)
        sums = dict.fromkeys(logits, 0.0)
        for places, targets in _parts(ids, start):
            logs = {name: value[places].double().log_softmax(-1) for name, value in logits.items()}
            for name, log in logs.items():
                sums[name] -= log.gather(1, targets[:, None]).sum().item()
            result.kl += (logs["dynamic"].exp() * (logs["dynamic"] - logs["merged"])).sum().item()
            result.agreed += int((logs["dynamic"].argmax(-1) == logs["merged"].argmax(-1)).sum())
        for name, nats in sums.items():
            getattr(result, name).append(nats)
    if not all(torch.isfinite(torch.tensor(getattr(result, name))).all() for name in ("base", "dynamic", "merged")):
        raise ModelError("a loss is NaN or infinite; the base, the adapter or the merged checkpoint is damaged")
    return result


def failures(figures: Mapping[str, Any], layers: Sequence[LayerDelta], config: MergeConfig, target: str) -> list[str]:
    """Which thresholds are missed, in words; none says that the merged model may stand for the adapter.

    Gain alone passes one that moved elsewhere too, KL alone one that lost a small tune: both are asked for. An adapter
    that does nothing has nothing to lose, and is judged by KL and agreement.
    """
    bits = "16bit" if target == "16bit" else "4bit"
    least, most_kl = getattr(config, f"min_gain_{bits}"), getattr(config, f"max_kl_{bits}")
    least_top1, kept = getattr(config, f"min_top1_{bits}"), projection(layers)
    found: list[str] = []
    gain = figures["gain_retained"]
    if delta_norm(layers) and gain is None:
        found.append(f"the adapter gains nothing here ({figures['gain']:.4g} nats per token): measure on its own task")
    elif gain is not None and not gain >= least:
        found.append(f"gain retained {gain:.4f} is under {least:g}")
    if not config.min_projection <= kept <= config.max_projection:
        found.append(f"projection {kept:.4f} is outside [{config.min_projection:g}, {config.max_projection:g}]")
    if not figures["kl"] <= most_kl:
        found.append(f"KL {figures['kl']:.3g} nats per token is over {most_kl:g}")
    if not figures["top1_agreement"] >= least_top1:
        found.append(f"top-1 agreement {figures['top1_agreement']:.4f} is under {least_top1:g}")
    return found


def _logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[rows, tokens, vocabulary] of rows of one length."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor(rows, device=model.device), use_cache=False).logits.cpu()


def _parts(ids: Sequence[int], start: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The places whose logits predict tokens `start` and on, a bounded number at a time, and those tokens."""
    for begin in range(start, len(ids), _TOKENS_AT_ONCE):
        end = min(begin + _TOKENS_AT_ONCE, len(ids))
        yield slice(begin - 1, end - 1), torch.tensor(list(ids[begin:end]))
