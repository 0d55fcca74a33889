"""The `train` section: one QLoRA run. Every field may also stand in the sweep's search space."""

from typing import Literal

from pydantic import Field, model_validator

from qlora_core.config.section import Section


class TrainConfig(Section):
    """Settings of one trial. Defaults are the QLoRA paper's for 7B and 13B models (appendix B), sized in epochs."""

    objective: Literal["sft", "dpo"] = Field(
        default="sft", description="sft: learn the answers; dpo: prefer the better answer of each preference pair"
    )
    dpo_beta: float = Field(default=0.1, gt=0, le=100, description="how closely dpo holds the adapter to the base")
    dpo_label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="share of pairs that dpo takes to be labelled the wrong way round"
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="an adapter to begin from: champion, models:/NAME/VERSION, or a PEFT folder; needs gate.slices.by",
    )
    start_as: Literal["weights", "parent"] = Field(
        default="weights",
        description="what start_from is to a trial: weights it begins with, or a frozen parent it is trained on top of",
    )
    lora_rank: int = Field(default=64, ge=1, le=1024)
    lora_alpha: float = Field(default=16.0, gt=0)
    lora_dropout: float = Field(default=0.1, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    sensitive_layers: int | None = Field(
        default=None, ge=1, description="adapt this many of the target layers, those a gradient probe finds steepest"
    )
    rank_pattern: dict[str, int] = Field(default={}, description="another rank for modules, by name ending")
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    use_dora: bool = Field(default=False, description="learn a magnitude for each output beside the direction")
    lora_init: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"] = "default"
    lora_plus_ratio: float = Field(default=1.0, gt=0, description="rate of B over that of A (LoRA+ uses 16)")
    learning_rate: float = Field(default=2e-4, gt=0, le=1)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of the steps, acting under every schedule")
    epochs: float = Field(default=3.0, gt=0, description="passes over the training rows, unless max_steps is set")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps; overrides epochs")
    micro_batch_size: int = Field(
        default=4, ge=1, description="rows in one forward pass; with data.packing, packed sequences"
    )
    gradient_accumulation_steps: int = Field(
        default=4, ge=1, description="effective batch = this times micro_batch_size"
    )
    group_by_length: bool = True
    optimizer: Literal["paged_adamw_32bit", "paged_adamw_8bit", "adamw", "lion", "sgd"] = "paged_adamw_32bit"
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.999, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=0.3, gt=0)
    spike_factor: float | None = Field(
        default=10.0, gt=1, description="a loss this many times the recent median is rolled back; null: never"
    )
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bf16 where it is native"
    )
    checkpoint_every_steps: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _parent_is_named(self) -> "TrainConfig":
        if self.start_as == "parent" and self.start_from is None:
            raise ValueError("start_as: parent needs start_from, which names the adapter to train on top of")
        if self.start_as == "parent" and self.use_dora:
            raise ValueError("start_as: parent with use_dora could not be fused; train plain LoRA on top of a parent")
        return self
