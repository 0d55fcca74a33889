"""The parts of the `data` section: readers, tags, policy, near-duplicates, decontamination, selection, packing."""

from typing import Literal

from pydantic import Field, model_validator

from qlora_core.config.section import Section

Action = Literal["keep", "drop"]
Redaction = Literal["keep", "redact", "drop"]


class ReadersConfig(Section):
    """How files become rows."""

    oasst: Literal["best_path", "best_replies"] = Field(
        default="best_path",
        description="best_path: one conversation a tree, the best reply at each level; best_replies: the best reply to "
        "every prompt of a tree, each with the turns that lead to it",
    )
    max_row_mb: float = Field(default=16.0, gt=0, description="a longer record is quarantined, unparsed")


class TagsConfig(Section):
    """What is measured on every row. Tags drop nothing; `data.policy` does."""

    language: bool = Field(default=True, description="language and confidence by lingua; und where it cannot tell")
    languages: list[str] = Field(
        default_factory=list, description="ISO 639-1 codes that are expected; the fewer, the surer; empty: all"
    )
    min_language_letters: int = Field(default=40, ge=0, description="shorter texts are und")
    min_language_confidence: float = Field(default=0.8, ge=0, le=1, description="less certain texts are und")
    personal_data: bool = Field(default=True, description="e-mails, phones, cards, keys, tokens: by pattern, no names")
    allow: list[str] = Field(
        default_factory=list, description="regular expressions; a match that fits one in full is no personal data"
    )
    model_scores: bool = Field(
        default=False, description="perplexity and instruction-following difficulty under the base model (slow)"
    )
    plugins: list[str] = Field(
        default_factory=list,
        description="module:function; takes a list of texts, gives a list of scores (toxicity, say); the tag has the "
        "function's name",
    )


class ScoreRange(Section):
    """The scores that are kept, both ends included. A row without the score is kept."""

    min: float | None = None
    max: float | None = None


class PolicyConfig(Section):
    """Which tags drop a row. Other thresholds re-run the policy, not the taggers."""

    languages: list[str] = Field(default_factory=list, description="ISO 639-1 codes to keep; empty keeps all")
    undetermined_language: Action = "keep"
    licence: Literal["any", "research", "share_alike", "commercial"] = Field(
        default="any", description="commercial drops rows whose licence is unknown"
    )
    personal_data: Redaction = "keep"
    secrets: Redaction = "redact"
    injection: Action = Field(default="drop", description="text that a chat template would take for a turn's border")
    truncated: Action = "keep"
    repeated_turns: Action = "keep"
    refusals: Action = "keep"
    placeholders: Action = Field(default="keep", description="unfilled {{name}} and the like")
    mojibake: Action = "keep"
    scores: dict[str, ScoreRange] = Field(
        default_factory=dict,
        description="ranges of numeric tags: repetition, answer_words, tokens, perplexity, ifd, or a plug-in's name",
    )


class NearDuplicatesConfig(Section):
    """MinHash proposes pairs, exact Jaccard similarity of word shingles decides."""

    action: Literal["keep_one", "drop_all", "report", "none"] = "keep_one"
    threshold: float = Field(default=0.8, gt=0, le=1, description="Jaccard similarity from which two rows are one")
    shingle_words: int = Field(default=5, ge=1)
    permutations: int = Field(default=128, ge=16, le=512)
    seed: int = Field(default=0, ge=0)


class DecontaminateConfig(Section):
    """Training rows that overlap with the sets named by `evaluate.prompt_sets`."""

    action: Literal["drop", "report"] = "drop"
    ngram_words: int = Field(default=13, ge=3)
    min_coverage: float = Field(
        default=0.3, gt=0, le=1, description="share of an item's words in shared n-grams from which it counts as found"
    )
    max_ngram_items: int = Field(
        default=10, ge=1, description="an n-gram in more items than this is a header of the set and counts for none"
    )
    min_exact_words: int = Field(
        default=5, ge=1, description="a prompt of fewer words ('Who are you?') is reported, never dropped"
    )


class SelectionConfig(Section):
    """A small diverse subset of the training side, and a random control of equal tokens beside it."""

    budget_rows: int | None = Field(default=None, ge=1, description="how many training rows to choose; null: all")
    clusters: int = Field(default=64, ge=1, description="groups of like prompts that share the budget")
    quality: str = Field(default="tokens", description="the numeric tag by which rows of a group are ranked")
    prefer: Literal["high", "low"] = "high"
    train_on: Literal["chosen", "control"] = Field(
        default="chosen", description="which of the two is the training side; the other is written beside it"
    )
    seed: int = Field(default=0, ge=0)


class PackingConfig(Section):
    """Short conversations in one sequence, each blind to the others."""

    enabled: bool = False
    tokens: int | None = Field(default=None, ge=8, description="length of a sequence; null: data.max_tokens")


class SplitConfig(Section):
    """Shares of the rows held out. A row's side is a salted hash of its own prompt, so added rows move nobody."""

    validation: float = Field(default=0.1, gt=0, lt=1, description="share that steers the sweep")
    test: float = Field(default=0.1, gt=0, lt=1, description="share that is looked at once, by evaluation")
    salt: str = Field(default="qlora", description="change it to draw another split")
    earlier: str | None = Field(
        default=None, description="an earlier curated folder: its rows keep their sides, and new rows give way to them"
    )

    @model_validator(mode="after")
    def _leave_something_to_train_on(self) -> "SplitConfig":
        if self.validation + self.test >= 1:
            raise ValueError(
                f"validation ({self.validation}) and test ({self.test}) together leave nothing to train on; "
                "their sum must be under 1"
            )
        return self
