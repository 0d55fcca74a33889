"""Teaches transformers to load and save 4-bit types that bitsandbytes has no kernels for, in this process alone.

Such a checkpoint has bitsandbytes' tensors and settings under another `quant_method`, so that programs without this
module do not compute nonsense from it. Knows no layers that could run it: until one is put in its place, bitsandbytes'
own refuses to.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from transformers import AutoConfig, BitsAndBytesConfig, PretrainedConfig
from transformers.integrations.bitsandbytes import Bnb4bitDeserialize
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

OWN_METHOD = "qlora"
OWN_TYPES = ("int4", "e2m1")


def has_own_type(quantization_config: Mapping[str, Any]) -> bool:
    """Whether the `quantization_config` of a checkpoint's config.json is of an own type."""
    return quantization_config.get("quant_method") == OWN_METHOD


def own_config(folder: Path) -> PretrainedConfig:
    """The config of a checkpoint of an own type, such that transformers loads the folder with it."""
    if OWN_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(OWN_METHOD)(OwnQuantizationConfig)
        register_quantizer(OWN_METHOD)(OwnQuantizer)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    # With load_in_4bit transformers takes it for bitsandbytes' own, whatever the method says
    settings = {key: value for key, value in config.quantization_config.items() if "load_in_" not in key}
    config.quantization_config = settings
    return config


class OwnQuantizationConfig(BitsAndBytesConfig):
    """bitsandbytes' settings under the own method."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{key: value for key, value in settings.items() if key != "quant_method"})
        self.quant_method = OWN_METHOD  # pyright: ignore[reportAttributeAccessIssue]  # an enum of what it comes with


class OwnQuantizer(Bnb4BitHfQuantizer):
    """transformers' loader of 4-bit weights, which also reads the own types' packed state."""

    serialized_names: ClassVar = {
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            *(f"weight.quant_state.bitsandbytes__{name}" for name in OWN_TYPES),
        ]
    }

    def get_load_operations(self) -> dict[str, Any]:
        """What makes weights of stored tensors."""
        return {"deserialize": _Deserialize}


class _OwnQuantState(QuantState):
    valid_quant_types = OWN_TYPES
    valid_qs_type_keys: ClassVar = [f"bitsandbytes__{name}" for name in OWN_TYPES]


class _Deserialize(Bnb4bitDeserialize):
    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if len(input_dict) == 1 or full_layer_name is None:
            return input_dict
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        codes = tensors.pop("weight")
        state = _OwnQuantState.from_dict(tensors, device=codes.device)
        module, _ = get_module_from_name(model, full_layer_name)
        module.quant_state, module._is_hf_initialized = state, True
        make: Any = Params4bit  # its signature is hidden behind torch.nn.Parameter's
        weight = make(
            codes,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=codes.dtype,
            module=module,
            bnb_quantized=True,
        )
        return {"weight": weight}
