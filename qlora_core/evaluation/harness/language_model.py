"""One system (the base, or one of its adapters) as lm-evaluation-harness sees a model. Imports the harness.

Knows the harness's requests and how they map to this project's scoring and generation, not which tasks ask.
Tokenization follows the harness's own Hugging Face model, so that figures compare with published ones.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_core.errors import EvaluationError
from qlora_core.evaluation.harness.requests import Continuation, score_continuations
from qlora_core.model.adapter_set import AdapterSet
from qlora_core.model.generate import generate_answers
from qlora_core.model.loss import max_positions_of
from qlora_core.progress import progress_bar

DEFAULT_NEW_TOKENS = 256
SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "num_beams")


class SystemLM(TemplateLM):
    """Scores and answers under one system of `model`; None is the base itself."""

    def __init__(
        self,
        model: PreTrainedModel | AdapterSet,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = tokenizer
        self._model = model
        self._system = system
        self._batch_size = batch_size
        inner = model.base if isinstance(model, AdapterSet) else model
        self._positions = max_positions_of(inner)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises EvaluationError where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise EvaluationError("the tokenizer has no EOS token; set one in its tokenizer_config.json")
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """Part of the harness's cache keys."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a text that brings its BOS gets no second one."""
        if add_special_tokens is None:
            opening = self.tokenizer.decode(self.prefix_token_id)
            own = {} if not string.startswith(opening) else {"add_special_tokens": False}
            return self.tokenizer.encode(string, **own)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as the tokenizer's template writes them."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, in disjoint windows of the model's length."""
        windows: list[Continuation] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            length = self._positions or max(len(ids), 1)
            parts = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(ids, self.prefix_token_id, length, 1)
            ]
            windows += [Continuation(tuple(context), tuple(predicted)) for context, predicted in parts]
            counts.append(len(parts))
        scored = iter(self._score(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, cut before the first of the request's stop texts.

        Raises EvaluationError where a task asks for sampling: greedy answers in its place would be other figures.
        """
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_length[_new_tokens(request.args[1])].append(index)
        answers = [""] * len(requests)
        for new_tokens, indices in by_length.items():
            found = generate_answers(
                self._model,
                self.tokenizer,
                [self._with_start(requests[index].args[0], new_tokens) for index in indices],
                max_new_tokens=new_tokens,
                batch_size=self._batch_size,
                stop_token_id=self.eot_token_id,
                adapters=[self._system] * len(indices) if isinstance(self._model, AdapterSet) else None,
            )
            for index, text in zip(indices, found, strict=True):
                answers[index] = _cut(text, requests[index].args[1].get("until") or [])
        return answers

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [Continuation(tuple(context), tuple(ids)) for _, context, ids in requests]
        return self._score(asked)

    def _score(self, asked: Sequence[Continuation]) -> list[tuple[float, bool]]:
        with progress_bar(f"Scoring {self._system or 'base'}", len(asked)) as advance:
            return [
                (each.log_probability, each.greedy)
                for each in score_continuations(
                    self._model, asked, batch_size=self._batch_size, system=self._system, advance=advance
                )
            ]

    def _with_start(self, context: str, new_tokens: int) -> str:
        """The prompt with the special tokens its encoding adds, as text; without its oldest part where it is too long.

        `generate_answers` adds none itself.
        """
        ids = self.tok_encode(context)
        if self._positions is not None:
            room = self._positions - new_tokens
            if room < 1:
                raise EvaluationError(
                    f"a task asks for {new_tokens} new tokens and the model takes {self._positions} in all; lower the "
                    "task's max_gen_toks"
                )
            ids = ids[-room:]
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _new_tokens(settings: dict[str, Any]) -> int:
    wanted = {name: settings[name] for name in SAMPLING if name in settings}
    sampled = wanted.get("do_sample") or float(wanted.get("temperature") or 0) > 0 or (wanted.get("num_beams") or 1) > 1
    if sampled:
        raise EvaluationError(f"a task asks for {wanted}; answers here are greedy: set do_sample: false in the task")
    return int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))


def _cut(text: str, until: str | Sequence[str]) -> str:
    ends = [text.find(stop) for stop in ([until] if isinstance(until, str) else until) if stop and stop in text]
    return text[: min(ends)] if ends else text
