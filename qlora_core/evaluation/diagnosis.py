"""Where an adapter is weak: the worst slices of its evaluation, with examples, and a request for data for each.

For people and for the next round of data; it decides nothing, so that its intervals stand each for itself. The idea of
rounds driven by what failed follows the Pioneer Agent and Self-Rewarding Language Models (Yuan et al. 2024).
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qlora_core.evaluation.statistics.bootstrap import ratio_interval

BY = ("category", "language")
MIN_ROWS = 5
SHOWN = 8
EXAMPLES = 3
FEWEST_WANTED = 50
POWER = 2.8
"""z(0.975) + z(0.8): n = (2.8 sd / effect)^2 rows show an effect in 8 of 10 tries at 5 %, two-sided."""


def diagnose(
    items: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    train_rows: Mapping[str, Mapping[str, int]],
    *,
    effect: float,
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The worst slices of a comparison's per-item table, and what data would mend them, as JSON data.

    `answers` are the lines of answers.jsonl, `train_rows` the training rows by label of each of `BY`, `effect` the
    change in nats per token that is worth noticing. Slices of fewer than `MIN_ROWS` scored rows are left out. Regressed
    ones (the interval of the gain below 0) come first, then those of the highest loss.

    Keys: `overall` {rows, loss}, `slices` [{by, value, rows, loss, excess, gain, gain_low, gain_high, regressed,
    matched, degenerate, refused, examples: [{id, loss, question, reference, answer}]}] (shares are null without
    prompts), `requests` [{by, value, train_rows, wanted_train_rows, wanted_test_rows, why, like: [row ids]}].
    """
    rows = items["rows"]
    tokens = np.array(rows["tokens"], np.float64)
    after = np.array(rows["after"], np.float64)
    overall = float(after.sum() / tokens.sum()) if tokens.sum() else 0.0
    texts = {line["prompt_id"]: line for line in answers}
    found = []
    for by in BY:
        for value in sorted({label for label in rows[by] if label is not None}):
            chosen = np.array([label == value for label in rows[by]])
            if chosen.sum() >= MIN_ROWS and tokens[chosen].sum():
                interval = {"confidence": confidence, "resamples": resamples, "seed": seed}
                found.append(_slice(by, value, items, chosen, overall, texts, interval))
    found.sort(key=lambda one: (not one["regressed"], -one["loss"], one["by"], one["value"]))
    worst = [one for one in found if one["regressed"] or one["excess"] > 0][:SHOWN]
    return {
        "overall": {"rows": len(tokens), "loss": overall},
        "slices": [{name: value for name, value in one.items() if name != "spread"} for one in worst],
        "requests": [_request(one, train_rows.get(one["by"], {}), effect) for one in worst],
    }


def diagnosis_lines(diagnosis: Mapping[str, Any]) -> list[str]:
    """One sentence for each request; empty where no slice is worse than the whole."""
    requests = {(one["by"], one["value"]): one for one in diagnosis["requests"]}
    return [
        f"{one['by']} {one['value']}: loss {one['loss']:.3f} ({one['excess']:+.3f} against all rows), gain "
        f"{one['gain']:+.3f} [{one['gain_low']:+.3f}, {one['gain_high']:+.3f}] over {one['rows']} rows"
        f"{'; it got worse' if one['regressed'] else ''}; wanted: "
        f"{requests[one['by'], one['value']]['wanted_train_rows']} more training rows"
        for one in diagnosis["slices"]
    ]


def _slice(
    by: str,
    value: str,
    items: Mapping[str, Any],
    chosen: np.ndarray,
    overall: float,
    texts: Mapping[str, Mapping[str, Any]],
    interval: Mapping[str, Any],
) -> dict[str, Any]:
    rows = items["rows"]
    before, after, tokens = (np.array(rows[name], np.float64)[chosen] for name in ("before", "after", "tokens"))
    gain = ratio_interval(before - after, tokens, **interval)
    loss = float(after.sum() / tokens.sum())
    per_row = after / np.maximum(tokens, 1)
    ids = [row_id for row_id, mine in zip(rows["id"], chosen, strict=True) if mine]
    worst = sorted(zip(-per_row, ids, strict=True))
    return {
        "by": by,
        "value": value,
        "rows": len(ids),
        "loss": loss,
        "excess": loss - overall,
        "gain": gain.value,
        "gain_low": gain.low,
        "gain_high": gain.high,
        "regressed": gain.high < 0,
        **_shares(items["prompts"], by, value),
        "examples": [_example(row_id, -minus, texts) for minus, row_id in worst if row_id in texts][:EXAMPLES],
        "worst_ids": [row_id for _, row_id in worst[:EXAMPLES]],
        "spread": float(np.std((before - after) / np.maximum(tokens, 1), ddof=1)),
    }


def _shares(prompts: Mapping[str, Any], by: str, value: str) -> dict[str, float | None]:
    mine = [index for index, label in enumerate(prompts[by]) if label == value]
    answered = prompts["after"]

    def share(name: str) -> float | None:
        said = [answered[name][index] for index in mine if answered[name][index] is not None]
        return sum(map(bool, said)) / len(said) if said else None

    return {"matched": share("matches"), "degenerate": share("degenerate"), "refused": share("refusal")}


def _example(row_id: str, loss: float, texts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    line = texts[row_id]
    said = {"question": line["question"], "reference": line["reference"], "answer": line["adapter"]}
    return {"id": row_id, "loss": float(loss), **said}


def _request(one: Mapping[str, Any], train_rows: Mapping[str, int], effect: float) -> dict[str, Any]:
    """As many training rows as the slices have in the middle, and as many test rows as would show `effect`."""
    have = train_rows.get(one["value"], 0)
    middle = round(statistics.median(train_rows.values())) if train_rows else 0
    needed = int(np.ceil((POWER * one["spread"] / effect) ** 2)) if effect > 0 else 0
    why = "it got worse" if one["regressed"] else f"its loss is {one['excess']:.3f} nats per token above all rows'"
    return {
        "by": one["by"],
        "value": one["value"],
        "train_rows": have,
        "wanted_train_rows": max(FEWEST_WANTED, middle - have),
        "wanted_test_rows": max(0, needed - one["rows"]),
        "why": why,
        "like": one["worst_ids"],
    }
