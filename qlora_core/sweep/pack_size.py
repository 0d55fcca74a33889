"""How many trials a worker trains at once. Knows numbers only.

Adapters are worth packing while a pass over the base has fewer tokens than the hardware needs to be busy: below that
knee the base's weights are read, or dequantized, for few rows. Beyond it a larger pack gains nothing and costs memory,
and more workers are the way to go faster.
"""

from qlora_core.config.train import TrainConfig

MOST_TRIALS = 8
KNEE_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of a pass from which packing gains little: estimates."""


def pack_size(wanted: int | None, train: TrainConfig, mean_tokens: float, device: str) -> int:
    """`wanted` where it is set, else as many trials as bring a pass to the knee, 8 at most.

    `mean_tokens`: of a training row, or of a packed sequence where there are any.
    """
    if wanted is not None:
        return wanted
    tokens = max(1.0, train.micro_batch_size * mean_tokens)
    return max(1, min(MOST_TRIALS, round(KNEE_TOKENS[device] / tokens)))
