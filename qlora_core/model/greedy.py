"""The decoding loop: each row's most probable token, one at a time, and rows that have stopped leave the batch.

Knows token ids and the base's cache; knows nothing of texts, adapters or batching.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

_ROW_INPUTS = ("attention_mask", "decoder_attention_mask", "position_ids", "token_type_ids")


def continue_greedily(
    model: PreTrainedModel,
    ids_bt: torch.Tensor,
    attention_bt: torch.Tensor,
    *,
    max_new_tokens: int,
    stop_token_id: int,
    on_keep: Callable[[Sequence[int]], object],
) -> list[list[int]]:
    """For each row of padded prompts: the tokens that follow, before the stop token, at most `max_new_tokens`.

    ids_bt and attention_bt: [rows, tokens], padded on the left, on the model's device. When rows stop, the others go on
    in a smaller batch, so that a stopped row costs one copy of the rest's cache; `on_keep` is told then which places
    of the present batch stay. What else the model's generation_config asks for is not used.
    """
    generate: Any = model.generate
    loop = partial(_decode, steps=max_new_tokens, stop_token_id=stop_token_id, on_keep=on_keep)
    with torch.inference_mode():
        # transformers makes the cache and the other inputs as this kind of model needs them
        return generate(
            input_ids=ids_bt,
            attention_mask=attention_bt,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            custom_generate=loop,
        )


def _decode(
    model: Any,
    ids_bt: torch.Tensor,
    *,
    steps: int,
    stop_token_id: int,
    on_keep: Callable[[Sequence[int]], object],
    logits_processor: object,
    stopping_criteria: object,
    generation_config: object,
    **inputs: Any,
) -> list[list[int]]:
    """What `generate` calls once it has prepared `inputs`; its processors and criteria have no part in this."""
    continuations: list[list[int]] = [[] for _ in ids_bt]
    prompt_of_row = list(range(len(ids_bt)))
    for step in range(steps):
        prepared = model.prepare_inputs_for_generation(
            ids_bt, next_sequence_length=1 if step else None, is_first_iteration=step == 0, **inputs
        )
        outputs = model(**prepared, return_dict=True)
        inputs = model._update_model_kwargs_for_generation(
            outputs, inputs, is_encoder_decoder=model.config.is_encoder_decoder
        )
        next_b = outputs.logits[:, -1].argmax(dim=-1)
        tokens = next_b.tolist()
        going = [row for row, token in enumerate(tokens) if token != stop_token_id]
        for row in going:
            continuations[prompt_of_row[row]].append(tokens[row])
        if not going:
            break
        ids_bt = torch.cat([ids_bt, next_b[:, None]], dim=1)
        if len(going) < len(tokens) and step + 1 < steps:
            kept_b = torch.tensor(going, device=ids_bt.device)
            ids_bt, prompt_of_row = ids_bt[kept_b], [prompt_of_row[row] for row in going]
            _keep_rows(inputs, kept_b)
            on_keep(going)
    return continuations


def _keep_rows(inputs: dict[str, Any], kept_b: Any) -> None:
    for name, value in inputs.items():
        if isinstance(value, Cache):
            value.reorder_cache(kept_b)  # it selects: fewer places than rows are as good as a permutation
        elif name == "encoder_outputs":  # what an encoder made of the prompts, rows first
            inputs[name] = BaseModelOutput(last_hidden_state=value["last_hidden_state"].index_select(0, kept_b))
        elif name in _ROW_INPUTS and value is not None:
            inputs[name] = value.index_select(-2, kept_b)  # rows are last but one, also where positions have 3 axes
