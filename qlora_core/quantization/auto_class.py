"""Which of transformers' Auto classes loads a checkpoint: one of a causal language model, or of T5.

Knows the model's type alone; imports transformers when asked.
"""

from typing import Any

ENCODER_DECODER_TYPES = ("mt5", "t5")
"""Families of an encoder and a decoder that are trained here; Flan-T5 and T5 1.1 are of type t5."""


def is_supported(model_type: str) -> bool:
    """Whether this transformers has a causal language model of that type, or it is one of ENCODER_DECODER_TYPES."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return model_type in ENCODER_DECODER_TYPES or model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def auto_class(model_type: str) -> Any:
    """AutoModelForSeq2SeqLM for ENCODER_DECODER_TYPES, else AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if model_type in ENCODER_DECODER_TYPES else AutoModelForCausalLM
