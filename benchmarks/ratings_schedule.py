"""How many judge calls it takes to know the best of six models: adaptive choice of pairs against round-robin.

Simulated verdicts with ties and an order effect, both orders of each prompt, one rule to stop for both schemes. The
share of runs that settle on the truly best model says whether the saving was paid for in certainty.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qlora_core.evaluation.schedule import Duel, Played, play
from qlora_core.evaluation.verdict import Verdict

ABILITIES = {"m0": 0.75, "m1": 0.35, "m2": 0.2, "m3": 0.0, "m4": -0.4, "m5": -0.9}
TIE = 0.5
LOG_ORDER = 0.3
LEAST_SAVING = 0.4


def measure(runs: int = 60, prompts: int = 600) -> dict[str, Any]:
    """Mean calls of both schemes, the share saved, and how often each settled on the best model."""
    figures: dict[str, Any] = {"runs": runs, "models": len(ABILITIES), "least_saving": LEAST_SAVING}
    for name, adaptive in (("round_robin", False), ("adaptive", True)):
        played = [simulate(seed, adaptive=adaptive, prompts=prompts) for seed in range(runs)]
        figures[name] = {
            "mean_calls": float(np.mean([each.calls for each in played])),
            "settled": float(np.mean([each.standing is not None and each.standing.settled for each in played])),
            "right": float(np.mean([each.standing is not None and each.standing.leader == "m0" for each in played])),
        }
    figures["saved"] = 1 - figures["adaptive"]["mean_calls"] / figures["round_robin"]["mean_calls"]
    return figures


def simulate(seed: int, *, adaptive: bool, prompts: int) -> Played:
    """One tournament whose verdicts follow Davidson's model with an order effect."""
    names = [f"p{i}" for i in range(prompts)]
    return play(list(ABILITIES), names, _judge(np.random.default_rng(seed)), adaptive=adaptive)


def _judge(rng: np.random.Generator) -> Callable[[Sequence[Duel]], list[Verdict]]:
    def judge(duels: Sequence[Duel]) -> list[Verdict]:
        return [row for duel in duels for row in both_orders(*duel)]

    def both_orders(a: str, b: str, prompt: str) -> list[Verdict]:
        rows = []
        for first, sign in (("a", 0.5), ("b", -0.5)):
            worth_a = np.exp(ABILITIES[a] + sign * LOG_ORDER)
            worth_b = np.exp(ABILITIES[b] - sign * LOG_ORDER)
            odds = np.array([worth_a, worth_b, TIE * np.sqrt(worth_a * worth_b)])
            verdict = ("a", "b", "tie")[int(rng.choice(3, p=odds / odds.sum()))]
            row = {"prompt_id": prompt, "model_a": a, "model_b": b, "verdict": verdict, "first": first, "judge": "s"}
            rows.append(Verdict.model_validate(row))
        return rows

    return judge
