"""A guard around training: the frozen base is where and what it was. Knows parameters, nothing of adapters."""

from transformers import PreTrainedModel

from qlora_core.errors import TrainingError


class BaseUntouched:
    """Checks, when the block has ended well, that no frozen weight was moved or rewritten in it.

    Raises:
        TrainingError: one was.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base

    def __enter__(self) -> None:
        """Note where the weights are."""
        self._before = self._places()

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Compare, unless the block failed for a reason of its own."""
        if kind is None and self._places() != self._before:
            raise TrainingError(
                "the frozen base's weights were moved or rewritten while an adapter was on it; load it anew with "
                "load_quantized, which keeps bitsandbytes from repacking weights in place"
            )

    def _places(self) -> dict[str, tuple[int, int]]:
        """Where each weight lies and how often it was written in place; writes through `.data` escape it.

        A held trial's adapter is on the base already, so names are taken as they are without one.
        """
        weights = ((name.replace(".base_layer.", "."), value) for name, value in self._base.named_parameters())
        return {name: (value.data_ptr(), value._version) for name, value in weights}
