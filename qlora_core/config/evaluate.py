"""The `evaluate` section: how the best trial is measured against the base model."""

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from qlora_core.config.section import SECRET, Section


class JudgeConfig(Section):
    """Who compares two answers. The API key comes from the environment (OPENAI_API_KEY) and nowhere else."""

    kind: Literal["auto", "openai", "offline", "checks", "none"] = Field(
        default="auto",
        description="auto: openai when OPENAI_API_KEY is set, else offline (uncertified); checks: see `checks`",
    )
    model: str = "gpt-4.1"
    mode: Literal["pairwise", "score10", "rubric", "reference"] = Field(
        default="pairwise",
        description="A, B or tie; 1 to 10 as in the QLoRA paper; 1 to 5 by `rubric`; or beside the reference answer",
    )
    rubric: str | None = Field(default=None, min_length=1, description="what the rubric mode rates by, in words")
    checks: str | None = Field(
        default=None, description="for kind checks: a .jsonl of programmatic checks by prompt or category (uncertified)"
    )
    certificate: str | None = Field(
        default=None, description="what `qlora judge certify` wrote; a judge without its own counts as uncertified"
    )
    base_url: str | None = Field(default=None, description="any OpenAI-compatible endpoint; default: the client's own")
    temperature: float | None = Field(default=0.2, ge=0, le=2, description="the paper's 0.2; null sends none")
    max_answer_tokens: int = Field(default=1024, ge=16)
    structured_output: bool = Field(
        default=False, description="probe whether the endpoint honours a JSON schema, and use it where it does"
    )
    batch: bool = Field(
        default=False, description="ask through the endpoint's batches: about half the price, answers within a day"
    )
    batch_price: float = Field(default=0.5, gt=0, le=1, description="what a call in a batch costs, as a share")
    batch_poll_s: float = Field(default=30.0, gt=0, description="how often a batch under way is asked for")
    calls_in_flight: int = Field(default=8, ge=1, le=512, description="fewer while the server refuses for the rate")
    timeout_s: float = Field(default=60.0, gt=0)
    max_retries: int = Field(default=4, ge=0)
    budget_usd: float = Field(default=5.0, gt=0, description="no call starts once this is spent")
    input_usd_per_million: float | None = Field(
        default=None, ge=0, description="price of a model the price table lacks"
    )
    output_usd_per_million: float | None = Field(default=None, ge=0)

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, url: str | None) -> str | None:
        # The resolved config is saved with every run, and a password or a key in a query would be saved with it.
        if url is not None and (urlsplit(url).username or urlsplit(url).query):
            message = "an address with a user name or a query belongs in OPENAI_BASE_URL, not in a config"
            raise PydanticCustomError(SECRET, message)
        return url

    @model_validator(mode="after")
    def _rubric_belongs_to_its_mode(self) -> "JudgeConfig":
        if (self.mode == "rubric") != (self.rubric is not None):
            raise ValueError("mode: rubric needs `rubric`, and no other mode reads one; set both or neither")
        return self

    @model_validator(mode="after")
    def _checks_belong_to_their_kind(self) -> "JudgeConfig":
        if (self.kind == "checks") != (self.checks is not None):
            raise ValueError(
                "kind: checks needs `checks`, a .jsonl file, and no other kind reads one; set both or neither"
            )
        return self


class EvaluateConfig(Section):
    """Held-out loss, exact match, and pairwise judging on the test split."""

    max_rows: int = Field(default=500, ge=2, description="test rows scored for loss")
    max_prompts: int = Field(default=100, ge=0, description="test prompts answered, matched and judged")
    max_new_tokens: int = Field(default=128, ge=1)
    exact_match_max_words: int = Field(default=12, ge=1, description="longer references are not compared word for word")
    batch_size: int = Field(
        default=16, ge=1, description="rows scored at once; prompts answered at once, each by base and candidates"
    )
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    resamples: int = Field(default=2000, ge=100, description="bootstrap resamples of the test rows")
    seed: int = Field(default=0, ge=0)
    prompt_sets: list[str] = Field(
        default_factory=list,
        description="files or folders of evaluation items (GSM8K, MMLU, MT-bench, ...) to keep out of the data",
    )
    general_text: str | None = Field(
        default=None, description="a text file on which forgetting is measured (gate.guards.max_perplexity_increase)"
    )
    latency_prompts: int = Field(
        default=0, ge=0, description="prompts answered one by one to measure seconds per token; 0: not measured"
    )
    parity_certificate: str | None = Field(
        default=None, description="what `qlora merge` wrote for this adapter (gate.guards.parity)"
    )
    votes: str | None = Field(
        default=None, description="a study of `qlora vote serve` (votes.sqlite): its votes on these answers are kept"
    )
    judge: JudgeConfig = JudgeConfig()
