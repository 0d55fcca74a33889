"""What was said of each pair of answers: a judge's verdicts in both orders and people's votes, from verdict rows.

Knows verdict rows of any origin (people's are those of a judge named `human:<rater>`), not texts, ratings or pages.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from qlora_core.evaluation.verdict import Verdict
from qlora_core.evaluation.vote.export import HUMAN_PREFIX

TIE = "tie"


def is_human(verdict: Verdict) -> bool:
    """Whether a row is a person's vote."""
    return verdict.judge.startswith(HUMAN_PREFIX)


@dataclass(frozen=True)
class Comparison:
    """Two models' answers to one prompt, by name in order, with all that was said of them. Scores are `first`'s."""

    prompt_id: str
    first: str
    second: str
    judged: tuple[Verdict, ...]
    votes: tuple[Verdict, ...]

    @property
    def judge_score(self) -> float | None:
        """Win 1, tie .5, loss 0, each order weighing the same; None where no verdict is scored."""
        shown = [fmean(scores) for scores in self._by_order(self.judged).values()]
        return fmean(shown) if shown else None

    @property
    def human_score(self) -> float | None:
        """The mean vote; None without votes."""
        scores = [self.score_of(row) for row in self.votes if row.scored]
        return fmean(scores) if scores else None

    @property
    def score(self) -> float | None:
        """The judge's score, and people's where no judge decided."""
        return self.human_score if self.judge_score is None else self.judge_score

    @property
    def order_gap(self) -> float | None:
        """The largest distance, over judges, between a judge's scores in its two orders; None without both orders."""
        judges: dict[str, list[Verdict]] = defaultdict(list)
        for row in self.judged:
            judges[row.judge].append(row)
        orders = [self._by_order(rows) for rows in judges.values()]
        gaps = [abs(fmean(by[self.first]) - fmean(by[self.second])) for by in orders if len(by) == 2]
        return max(gaps) if gaps else None

    @property
    def tally(self) -> dict[str, int]:
        """People's votes by winner, `tie` among them, most first."""
        counts = Counter(self.winner(row) for row in self.votes if row.scored)
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def majority(self) -> str | None:
        """What most people chose, alone at the top; else None."""
        ranked = list(self.tally.items())
        return ranked[0][0] if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]) else None

    @property
    def verdict(self) -> str | None:
        """What every scored row of the judges says; None where they differ or none is scored."""
        said = {self.winner(row) for row in self.judged if row.scored}
        return said.pop() if len(said) == 1 else None

    def score_of(self, row: Verdict) -> float:
        """A scored row's score of `first`."""
        return row.score_a if row.model_a == self.first else 1 - row.score_a

    def winner(self, row: Verdict) -> str:
        """The model a scored row prefers, or `tie`."""
        return {"a": row.model_a, "b": row.model_b}.get(str(row.verdict), TIE)

    def _by_order(self, rows: Iterable[Verdict]) -> dict[str, list[float]]:
        """Scores by the model shown first."""
        found: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            if row.scored:
                found[row.model_a if row.first == "a" else row.model_b].append(self.score_of(row))
        return found


def comparisons_of(verdicts: Sequence[Verdict]) -> list[Comparison]:
    """The rows by prompt and pair of models, in the order of these names; empty for none."""
    grouped: dict[tuple[str, str, str], list[Verdict]] = defaultdict(list)
    for row in verdicts:
        first, second = sorted((row.model_a, row.model_b))
        grouped[row.prompt_id, first, second].append(row)
    return [
        Comparison(*key, tuple(row for row in rows if not is_human(row)), tuple(row for row in rows if is_human(row)))
        for key, rows in sorted(grouped.items())
    ]
