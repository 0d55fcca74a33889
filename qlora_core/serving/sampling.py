"""The next token of one row from its logits: the most probable one, or one drawn from the nucleus.

A row draws from a generator of its own, on the CPU and in float64, so that a seed gives the same tokens whatever else
is being answered. Knows nothing of texts or batches. Shape suffix: v vocabulary.
"""

from typing import NamedTuple

import torch


class Choice(NamedTuple):
    """A token, ln p of it, and the `top` most probable ones with theirs; ln p is the model's own, at temperature 1."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampling(NamedTuple):
    """How tokens are chosen. temperature 0 is greedy; `top_logprobs` None: no log-probabilities are wanted."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


class Sampler:
    """Chooses the tokens of one answer, one after another. `seed` None: another answer every time."""

    def __init__(self, settings: Sampling) -> None:
        self._settings = settings
        self._generator = torch.Generator()
        if settings.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(settings.seed)

    def choose(self, logits_v: torch.Tensor) -> Choice:
        """The next token. Ties go to the lowest id. `logprob` is NaN where none was asked for."""
        settings = self._settings
        token = int(logits_v.argmax()) if settings.temperature == 0 else self._draw(logits_v)
        if settings.top_logprobs is None:
            return Choice(token, float("nan"), ())
        logs_v = logits_v.double().log_softmax(-1)
        values, ids = logs_v.topk(min(settings.top_logprobs, len(logs_v)))
        return Choice(token, float(logs_v[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _draw(self, logits_v: torch.Tensor) -> int:
        """Nucleus sampling (Holtzman et al. 2020): the smallest set of most probable tokens that holds `top_p`."""
        probabilities_v = (logits_v.double().cpu() / self._settings.temperature).softmax(-1)
        sorted_v, ids_v = probabilities_v.sort(descending=True, stable=True)
        cumulative_v = sorted_v.cumsum(-1)
        before_v = cumulative_v - sorted_v
        kept = max(1, int((before_v < self._settings.top_p).sum()))
        drawn = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative_v[kept - 1]
        place = int(torch.searchsorted(cumulative_v[:kept].contiguous(), drawn, right=True))
        return int(ids_v[min(place, kept - 1)])
