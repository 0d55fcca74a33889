"""The text of the config that `qlora init` writes: every section, each setting that matters with a line on it.

Settings left out have defaults that work. A test loads this text, so it holds only names the config knows.
"""

DEMO_CONFIG = """\
# One retraining job. Run it with:  qlora run pipeline.yaml
# It works as it stands: a small base model and the rows in data/ are made by the project itself. For your own job, name
# your files under data.sources and your model under base.model, and take out the settings marked "for the demo".
# Any setting can be overridden for one run:  qlora run pipeline.yaml --set sweep.trials=2

data:
  # Files or folders, s3:// paths, hub names as hf://owner/name@commit, the most trusted first. Formats (Alpaca,
  # messages, ShareGPT, prompt/response, preference pairs, OASST, ...) are recognised by content.
  sources: [data]
  # Longer rows are dropped (or cut, with `over_long: cut`). For the demo: its model has room for 256 tokens.
  max_tokens: 256
  over_long: drop
  # More unreadable rows than this share stop the run; fewer are set aside with file, line and reason.
  max_quarantined_share: 0.2
  split:
    # Steers the sweep.
    validation: 0.1
    # Looked at once, by the evaluation.
    test: 0.1
    # Change it to draw another split.
    salt: qlora
  # Which tags drop a row: licence, languages, personal_data and secrets (keep, redact, drop), and more.
  # policy: {licence: commercial, languages: [en], personal_data: redact}
  # Rows whose word shingles are at least this alike (Jaccard) are one; `action: report` drops none.
  near_duplicates: {threshold: 0.8}
  # Whole rows side by side in one sequence, blind to each other; then train.micro_batch_size counts sequences.
  # packing: {enabled: true}
  # A Jinja file; without it, the base tokenizer's own template.
  # chat_template: chat.jinja

base:
  # A checkpoint folder, a hub name (then pin `revision` too), or `demo` for the small model made on the spot.
  model: demo

quantize:
  # The 4-bit type; nf4 is the QLoRA paper's.
  type: nf4
  # Weights that share one scale.
  blocksize: 64
  # Quantize the scales as well: 4.127 instead of 4.5 bits per parameter.
  double_quant: true
  # Linear layers kept in full precision, by name ending.
  skip_modules: [lm_head]
  # A text: the report then says what four bits cost on it, and what other formats would.
  # quality_text: held-out.txt

train:
  # Any field of this section may stand in sweep.space instead.
  # Size of the adapter. For the demo: a small model needs little; the default is 64.
  lora_rank: 16
  # The adapter's output is scaled by lora_alpha / lora_rank.
  lora_alpha: 16
  # For the demo none; the default is the paper's 0.1.
  lora_dropout: 0.0
  target_modules: all-linear
  # For the demo: two layers bear a far higher rate than the default 2e-4.
  learning_rate: 5.0e-3
  # constant, linear, cosine, or wsd (warm-up, stable, decay).
  schedule: linear
  # Share of the steps in which the rate climbs.
  warmup_ratio: 0.03
  # Passes over the training rows; max_steps would override it.
  epochs: 5
  # Rows in one forward pass, and passes that make up one step: their product is the effective batch.
  micro_batch_size: 16
  gradient_accumulation_steps: 1
  # paged_adamw_32bit, paged_adamw_8bit, adamw, lion, or sgd.
  optimizer: paged_adamw_32bit
  max_grad_norm: 1.0
  # auto: bf16 where it is native, else float32.
  precision: auto
  # How much work an interruption can cost.
  checkpoint_every_steps: 100
  seed: 0

sweep:
  # grid, random, or tpe.
  method: grid
  # What is varied: fields of `train`, each with a list of values (or, not for grid, {low, high, log}).
  space:
    learning_rate: [2.5e-3, 5.0e-3]
    lora_rank: [8, 16]
  pruning:
    # Successive halving: trials that lag at a rung are stopped.
    enabled: true
    # Of the trials at a rung, one in this many goes on.
    reduction_factor: 2
  # So many of the best trials are evaluated together; the gate sees the best alone.
  # candidates: 3
  seed: 0

evaluate:
  # Files of evaluation items (GSM8K, MMLU, ...) that the training data must not hold.
  # prompt_sets: [eval/gsm8k_test.jsonl]
  # Test rows scored for loss, and test prompts answered, matched and judged.
  max_rows: 500
  max_prompts: 150
  # For the demo: its answers are short.
  max_new_tokens: 16
  batch_size: 32
  # Of every interval.
  confidence: 0.95
  judge:
    # auto: an OpenAI-compatible judge when OPENAI_API_KEY is set, else an offline one that is labelled uncertified.
    # openai, offline, none and checks choose one; checks takes `checks: FILE`, see docs/evaluation.md.
    kind: auto
    model: gpt-4.1
    # No call starts once this much is spent.
    budget_usd: 5.0

gate:
  # Nats per token by which the loss must fall; the whole interval must lie above it.
  min_loss_gain: 0.0
  # With fewer scored test rows the verdict is HOLD.
  min_rows: 30
  # Largest tolerated fall in exact match.
  max_exact_match_loss: 0.02
  # `require`: a certified judge must prefer the new adapter too.
  judge: ignore
  # No part of the data may get worse; guards are off until they are set (docs/promotion.md).
  # slices: {by: category, margin: 0.05, underpowered: hold}
  # guards: {length_ratio: [0.6, 1.6], max_refusal_increase: 0.01, max_degenerate_share: 0.02}

registry:
  # The registered model in MLflow; load the promoted adapter as models:/assistant@champion.
  model_name: assistant
  experiment: qlora-fleet
  # An MLflow server; without it, SQLite in compute.work_dir.
  # tracking_uri: http://localhost:5000

# Where artifacts are kept: a folder, or s3://bucket/prefix. A stage whose inputs have not changed is read from here.
store: ./.qlora

compute:
  # Nothing here changes a result by more than rounding.
  # Without `workers`: one per GPU, else one per CPU core, at most four.
  # workers: 2
  # Trials that a worker trains at once; without it, as many as keep it busy.
  # pack_size: 4
  # An existing Ray cluster; without it, one is started and ended.
  # ray_address: ray://head:10001
  # Checkpoints, the sweep's study, MLflow's SQLite, logs.
  work_dir: ./.qlora
"""


def demo_config() -> str:
    """The commented `pipeline.yaml` of the demo; paths in it are relative to the file."""
    return DEMO_CONFIG
