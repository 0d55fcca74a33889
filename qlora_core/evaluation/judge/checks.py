"""Judges that need no model: programmatic checks of answers, and the baseline that the longer answer wins.

What checks are good for: tasks whose right answers a program can tell (a number, a format, a constraint, a unit test).
What they are not: a measure of quality beyond the check. A pair whose answers both pass, or both fail, is a tie. None
is certified. Code is never run here: `sandbox` does that.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qlora_core.digest import digest_json
from qlora_core.errors import EvaluationError
from qlora_core.evaluation.exact_match import matches
from qlora_core.evaluation.pairwise import Judgement, Question
from qlora_core.evaluation.sandbox import run_tests

MAX_WORDS = 12


class _Check(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExactMatch(_Check):
    """The answer gives the reference: see `exact_match.matches`."""

    kind: Literal["exact_match"]
    reference: str = Field(min_length=1)

    def passes(self, answer: str) -> bool:
        """Whether the answer passes."""
        return matches(answer, self.reference, max(MAX_WORDS, len(self.reference.split()))) is True


class Regex(_Check):
    """The pattern is found in the answer (`full`: is all of it)."""

    kind: Literal["regex"]
    pattern: str
    full: bool = False

    def passes(self, answer: str) -> bool:
        """Whether the answer passes. Raises EvaluationError for a pattern that is none."""
        try:
            pattern = re.compile(self.pattern, re.DOTALL)
        except re.error as error:
            raise EvaluationError(f"the check's pattern {self.pattern!r} is no regular expression ({error})") from error
        return (pattern.fullmatch(answer.strip()) if self.full else pattern.search(answer)) is not None


class JsonSchema(_Check):
    """The answer is one JSON document (a code fence around it is allowed) that the schema accepts (draft 2020-12)."""

    kind: Literal["json_schema"]
    value: dict[str, Any] = Field(alias="schema")

    def passes(self, answer: str) -> bool:
        """Whether the answer passes. Raises EvaluationError for a schema that is none."""
        import jsonschema

        fenced = re.fullmatch(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", answer, re.DOTALL)
        try:
            document = json.loads(fenced[1] if fenced else answer)
            jsonschema.validate(document, self.value, cls=jsonschema.Draft202012Validator)
        except jsonschema.SchemaError as error:
            raise EvaluationError(f"the check's schema is no JSON schema: {error.message}") from error
        except (json.JSONDecodeError, jsonschema.ValidationError):
            return False
        return True


class Constraint(_Check):
    """A verifiable instruction in the manner of IFEval (Zhou et al. 2023); every field that is set must hold."""

    kind: Literal["constraint"]
    min_words: int | None = Field(default=None, ge=0)
    max_words: int | None = Field(default=None, ge=0)
    sentences: int | None = Field(default=None, ge=0)
    paragraphs: int | None = Field(default=None, ge=0)
    bullets: int | None = Field(default=None, ge=0)
    keywords: tuple[str, ...] = Field(default=(), strict=False)
    forbidden: tuple[str, ...] = Field(default=(), strict=False)
    lower_case: bool = False
    upper_case: bool = False
    no_commas: bool = False
    ends_with: str | None = None
    starts_with: str | None = None

    def passes(self, answer: str) -> bool:
        """Whether the answer passes. A keyword is a whole word or phrase, whatever its case."""
        text = answer.strip()
        return all(self._counts(text)) and all(self._words(text))

    def _counts(self, text: str) -> list[bool]:
        words = len(text.split())
        found = {
            "sentences": len(re.findall(r"[^.!?]+(?:[.!?]+|$)", text)) if text else 0,
            "paragraphs": len([part for part in re.split(r"\n\s*\n", text) if part.strip()]),
            "bullets": len(re.findall(r"^\s*(?:[-*+]|\d+[.)])\s+\S", text, re.MULTILINE)),
        }
        wanted = {name: getattr(self, name) for name in found}
        return [
            self.min_words is None or words >= self.min_words,
            self.max_words is None or words <= self.max_words,
            *(wanted[name] is None or wanted[name] == found[name] for name in found),
        ]

    def _words(self, text: str) -> list[bool]:
        def holds(phrase: str) -> bool:
            return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None

        return [
            *(holds(phrase) for phrase in self.keywords),
            *(not holds(phrase) for phrase in self.forbidden),
            not self.lower_case or text == text.lower(),
            not self.upper_case or text == text.upper(),
            not self.no_commas or "," not in text,
            self.ends_with is None or text.endswith(self.ends_with),
            self.starts_with is None or text.startswith(self.starts_with),
        ]


class UnitTests(_Check):
    """The answer's Python code passes the tests, run apart from this process; see `sandbox`."""

    kind: Literal["unit_tests"]
    tests: str = Field(min_length=1)
    timeout_s: float = Field(default=10.0, gt=0)

    def passes(self, answer: str) -> bool:
        """Whether the answer passes."""
        return run_tests(answer, self.tests, timeout_s=self.timeout_s)


Check = ExactMatch | Regex | JsonSchema | Constraint | UnitTests


def read_check(data: Mapping[str, Any]) -> Check:
    """A check from its JSON form. Raises EvaluationError saying what is wrong with it."""
    try:
        kinds = {"exact_match": ExactMatch, "regex": Regex, "json_schema": JsonSchema, "constraint": Constraint}
        known = {**kinds, "unit_tests": UnitTests}
        if data.get("kind") not in known:
            raise EvaluationError(f"check kind {data.get('kind')!r} is unknown; choose one of {', '.join(known)}")
        return known[data["kind"]].model_validate(data)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise EvaluationError(f"the {data.get('kind')} check's {where or 'form'}: {fault['msg']}") from error


class CheckJudge:
    """The answer that passes its prompt's check beats one that does not. `checks`: the check of each prompt id."""

    name = "offline:checks"
    certified = False

    cost_usd = 0.0
    snapshot: str | None = None

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self._checks = checks

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checks by prompt."""
        return digest_json({name: check.model_dump(mode="json") for name, check in self._checks.items()})

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, in order; "no_check" where the prompt has none."""
        passed: dict[tuple[str, str], bool] = {}  # both orders show the same answers: each is checked once
        judgements = []
        for question in questions:
            check = self._checks.get(question.prompt_id)
            if check is None:
                judgements.append(Judgement(None, "no_check: the prompt has no programmatic check"))
            else:
                for answer in (question.first_answer, question.second_answer):
                    if (question.prompt_id, answer) not in passed:
                        passed[question.prompt_id, answer] = check.passes(answer)
                first = passed[question.prompt_id, question.first_answer]
                second = passed[question.prompt_id, question.second_answer]
                judgements.append(_by_size(float(first), float(second)))
            advance(1)
        return judgements


class LongestWins:
    """The longer answer wins. Good for nothing but as the baseline that a judge must beat."""

    name = "offline:longest-wins"
    certified = False

    def decide(self, questions: Sequence[Question], advance: Callable[[float], None]) -> list[Judgement]:
        """One judgement per question, by characters without white space at the ends."""
        advance(len(questions))
        return [_by_size(len(q.first_answer.strip()), len(q.second_answer.strip())) for q in questions]


def _by_size(first: float, second: float) -> Judgement:
    return Judgement("first" if first > second else "second" if second > first else "tie")
