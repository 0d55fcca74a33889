"""How often the gate promotes a challenger that is no better, and how soon one that is, on real verdicts read after
every item.

Items are drawn from PandaLM's 999 pairs with the verdicts of three people each (win 1, tie .5, loss 0, averaged). A
challenger that wins a share of one half is made by turning each pair round at random, which keeps the real scatter and
ties; a better one by turning it the right way more often. Reading begins at the policy's `min_rows` and stops at the
first PROMOTE or REJECT, or at `items`. The negative control reads a 95 % Student interval every 25 items.

The bound: at most 5 % false promotions under continuous reading.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qlora_core.config.gate import GateConfig
from qlora_core.evaluation.statistics.sequential import confidence_sequence
from qlora_core.registry.gate.decide import decide

VERDICTS = Path(__file__).resolve().parents[2] / "shared" / "data" / "human" / "pandalm" / "testset-v1.json"
SCORE = {1: 1.0, 2: 0.0, 0: 0.5}
ANNOTATORS = ("annotator1", "annotator2", "annotator3")
ALPHA = 0.05
LIMIT = 0.05
GAINS = (0.03, 0.05, 0.1, 0.15)
CONTROL_STEP = 25
PRIMARY: dict[str, Any] = {"metric": "judge", "test": "always_valid", "alpha": ALPHA}
POLICY = GateConfig.model_validate({"primary": PRIMARY})
CHECKED_AT = (100, 400)


def measure(items: int = 800, null_runs: int = 1500, runs: int = 300, checked: int = 25) -> dict[str, Any]:
    """Shares of runs and numbers of items for a win rate of one half, and for gains over it."""
    scores = _scores(VERDICTS)
    rng = np.random.default_rng(0)
    null = [_orient(scores, rng, items, 0.0) for _ in range(null_runs)]
    table = [_row(0.0, null)]
    table += [_row(gain, [_orient(scores, rng, items, gain) for _ in range(runs)]) for gain in GAINS]
    table += [_pair_row(name, pair, rng, items, runs) for name, pair in _pairs(VERDICTS).items() if name in SHOWN_PAIRS]
    return {
        "data": "PandaLM test set v1, 999 pairs, 3 annotators",
        "sd": float(scores.std(ddof=1)),
        "policy": POLICY.primary.model_dump(),
        "read_from": POLICY.min_rows,
        "items": items,
        "table": table,
        "decisions_compared_with_the_gate": _compare_with_gate(null[:checked]),
        "limit": LIMIT,
    }


SHOWN_PAIRS = ("bloom-7b_llama-7b", "llama-7b_opt-7b")


def _scores(path: Path) -> NDArray[np.float64]:
    """The first answer's mean score per pair, shape [pairs]."""
    rows = json.loads(path.read_text())
    return np.array([np.mean([SCORE[row[name]] for name in ANNOTATORS]) for row in rows], dtype=np.float64)


def _pairs(path: Path) -> dict[str, NDArray[np.float64]]:
    """The second model's scores per pair of models: real differences, of real sizes."""
    grouped: dict[str, list[float]] = {}
    for row in json.loads(path.read_text()):
        grouped.setdefault(row["cmp_key"], []).append(1 - float(np.mean([SCORE[row[name]] for name in ANNOTATORS])))
    return {name: np.array(found) for name, found in grouped.items()}


def _orient(scores: NDArray[np.float64], rng: np.random.Generator, items: int, gain: float) -> NDArray[np.float64]:
    """Items drawn with replacement, each with its better side the challenger's so often that the mean is .5 + gain."""
    lead = np.abs(rng.choice(scores, items) - 0.5)
    mine = rng.random(items) < 0.5 + gain / (2 * np.abs(scores - 0.5).mean())
    return 0.5 + np.where(mine, lead, -lead)


def _row(gain: float, drawn: list[NDArray[np.float64]]) -> dict[str, Any]:
    """One line of the table."""
    stops = [_stop(run) for run in drawn]
    promoted = sum(verdict == "PROMOTE" for verdict, _ in stops)
    sizes = [size for _, size in stops]
    of_promoted = [size for verdict, size in stops if verdict == "PROMOTE"]
    upper = float(stats.beta.ppf(0.975, promoted + 1, len(drawn) - promoted)) if promoted < len(drawn) else 1.0
    return {
        "win_rate": 0.5 + gain,
        "runs": len(drawn),
        "promoted": promoted / len(drawn),
        "promoted_upper": upper,
        "rejected": sum(verdict == "REJECT" for verdict, _ in stops) / len(drawn),
        "mean_items": float(np.mean(sizes)),
        "median_items_to_promote": float(np.median(of_promoted)) if of_promoted else None,
        "control_promoted": sum(map(_control, drawn)) / len(drawn),
        "fixed_n_power": float(np.mean([_student_low(run) > 0.5 for run in drawn])),
    }


def _pair_row(
    name: str, scores: NDArray[np.float64], rng: np.random.Generator, items: int, runs: int
) -> dict[str, Any]:
    """Two real systems as they are, their pairs drawn with replacement; the second is the challenger."""
    drawn = [rng.choice(scores, items) for _ in range(runs)]
    return {"pair": name, **_row(float(scores.mean()) - 0.5, drawn)}


def _stop(run: NDArray[np.float64]) -> tuple[str, int]:
    """The first verdict that ends the reading, and after how many items."""
    bounds = confidence_sequence(run, confidence=1 - ALPHA)
    over, under = bounds[:, 0] > 0.5, bounds[:, 1] <= 0.5
    for at in np.flatnonzero(over | under):
        if at + 1 >= POLICY.min_rows:
            return ("PROMOTE" if over[at] else "REJECT"), int(at) + 1
    return "HOLD", len(run)


def _control(run: NDArray[np.float64]) -> bool:
    return any(_student_low(run[:size]) > 0.5 for size in range(CONTROL_STEP * 2, len(run) + 1, CONTROL_STEP))


def _student_low(run: NDArray[np.float64]) -> float:
    return float(run.mean() - stats.t.ppf(1 - ALPHA / 2, len(run) - 1) * run.std(ddof=1) / np.sqrt(len(run)))


def _compare_with_gate(runs: list[NDArray[np.float64]]) -> int:
    """How many decisions were made by the gate itself on the same items and found equal; stops at the first that is
    not.
    """
    compared = 0
    for run in runs:
        for size in (*CHECKED_AT, len(run)):
            verdict, at = _stop(run[:size])
            found = decide(_evaluation(run[:size]), None, POLICY).verdict
            if found != verdict:
                raise SystemExit(f"the gate says {found} after {size} items, the simulation {verdict} at {at}")
            compared += 1
    return compared


def _evaluation(run: NDArray[np.float64]) -> dict[str, Any]:
    """Evidence as an evaluation records it: the judge's score of each prompt."""
    count = len(run)
    heldout = {"rows": count, "base_loss": 2.0, "adapter_loss": 2.0, "gain": 0.0, "gain_low": 0.0, "gain_high": 0.0}
    judge = {"kind": "replay", "certified": True, "scored": count, "unscored": 0, "win_rate": float(run.mean())}
    ids = [f"{number:06d}" for number in range(count)]
    prompts = {"id": ids, "judge": run.tolist(), "human": [None] * count}
    return {"metrics": {"heldout": heldout, "exact_match": None, "judge": judge}, "items": {"prompts": prompts}}
