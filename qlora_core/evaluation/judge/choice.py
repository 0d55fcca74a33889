"""Which judge a config means, opened for one judging, and what is told of it.

Knows the kinds: an endpoint, programmatic checks, or a local model by log-probability, which its caller has to load.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_core.config.evaluate import EvaluateConfig
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.answer_book import Prompt
from qlora_core.evaluation.judge.cache import VerdictCache
from qlora_core.evaluation.judge.check_file import checks_for, read_check_rows
from qlora_core.evaluation.judge.checks import CheckJudge
from qlora_core.evaluation.judge.endpoint import OpenAIJudge, open_openai_judge
from qlora_core.evaluation.pairwise import Judge, summarise_verdicts
from qlora_core.evaluation.verdict import Verdict

CERTIFICATE_FIELDS = {"judge", "fingerprint", "snapshot", "gold_digest", "passed", "created", "figures"}


@dataclass(frozen=True)
class ChosenJudge:
    """A judge of a resolved `kind` (none, offline, checks, openai); `opened` is None for none and offline."""

    kind: str
    config: EvaluateConfig
    opened: OpenAIJudge | CheckJudge | None

    def judge(self, local: Callable[[], Judge]) -> Judge:
        """The judge itself; `local` makes the one by log-probability where that is meant."""
        return local() if self.opened is None else self.opened

    @property
    def certified(self) -> bool:
        """Whether its verdicts may count as evidence."""
        return self.opened is not None and self.opened.certified

    @property
    def facts(self) -> dict[str, Any]:
        """What it is: kind, model, certified, fingerprint, snapshot, certificate (null where it has none), cost_usd."""
        judge = self.opened
        if isinstance(judge, OpenAIJudge):
            model, given = self.config.judge.model, judge.certificate
        else:
            model, given = "the quantized base" if judge is None else judge.name, None
        return {
            "kind": self.kind,
            "model": model,
            "certified": self.certified,
            "fingerprint": None if judge is None else judge.fingerprint,
            "snapshot": None if judge is None else judge.snapshot,
            "certificate": None if given is None else given.model_dump(mode="json", include=CERTIFICATE_FIELDS),
            "cost_usd": 0.0 if judge is None else judge.cost_usd,
        }

    def metrics(self, verdicts: Sequence[Verdict], model: str) -> dict[str, Any] | None:
        """`model`'s win rate and what the judge is worth (`summarise_verdicts`), with its facts; None for kind none."""
        if self.kind == "none":
            return None
        config = self.config
        summary = summarise_verdicts(
            verdicts, model, confidence=config.confidence, resamples=config.resamples, seed=config.seed
        )
        return {**self.facts, **summary}


@contextmanager
def open_judge(
    config: EvaluateConfig,
    kind: str,
    environment: Mapping[str, str],
    verdict_cache: VerdictCache | None,
    prompts: Mapping[str, Prompt],
) -> Iterator[ChosenJudge]:
    """The judge of `kind` for these prompts. An endpoint is reached once, before minutes are spent on answers.

    Raises what `open_openai_judge` and its `check` do; EvaluationError for a file of checks that cannot be read, or
    that has a check for none of the prompts.
    """
    if kind == "openai":
        with open_openai_judge(config.judge, environment, verdict_cache) as endpoint:
            endpoint.check()
            yield ChosenJudge(kind, config, endpoint)
    elif kind == "checks":
        yield ChosenJudge(kind, config, _check_judge(config, prompts))
    else:
        yield ChosenJudge(kind, config, None)


def _check_judge(config: EvaluateConfig, prompts: Mapping[str, Prompt]) -> CheckJudge:
    path = Path(config.judge.checks or "")
    checks = checks_for(read_check_rows(path), prompts)
    if prompts and not checks:
        raise EvaluationError(
            f"{path} has a check for none of the {len(prompts)} prompts; select them by `prompt_id`, `prompt` or "
            "`category`, or give one check without a selector for all"
        )
    return CheckJudge(checks)
