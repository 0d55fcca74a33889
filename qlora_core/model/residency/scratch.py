"""The buffer that 4-bit weights are dequantized into, one after another. Knows stored tensors, and no layers.

A weight stands in it while one product is computed; the next one is written over it.
"""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from qlora_core.quantization.blockwise import QuantizedTensor, dequantize_into


class _ThreadBuffers(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[Any, torch.Tensor] = {}


class Scratch:
    """One buffer per device and dtype, as large as the largest weight it was asked for.

    On the CPU every thread has buffers of its own. On a GPU the threads of one stream share theirs: autograd runs the
    backward pass in another thread on the same stream, where work is done in the order in which it was started.
    """

    def __init__(self) -> None:
        self._of_thread = _ThreadBuffers()
        self._of_stream: dict[Any, torch.Tensor] = {}
        self._stream_lock = threading.Lock()

    def reserve(self, elements: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """The flat buffer for this thread or stream, made larger where it has less than `elements` elements."""
        if device.type == "cpu":
            buffers, key = self._of_thread.buffers, (device, dtype)
        else:
            buffers, key = self._of_stream, (device, dtype, torch.cuda.current_stream(device).cuda_stream)
        if key not in buffers or buffers[key].numel() < elements:
            buffers.pop(key, None)  # before the larger one is made: the two together may not fit
            with torch.inference_mode(False):  # else it could not be written to outside of inference mode
                buffers[key] = torch.empty(elements, dtype=dtype, device=device)
        return buffers[key]

    @contextmanager
    def holding(self, stored: QuantizedTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The values of `stored`, in its shape and `dtype`: for products that are started within the block."""
        device = stored.codes.device
        if device.type == "cpu":
            yield self._fill(stored, dtype)
        else:
            with self._stream_lock:  # no other thread may fill the buffer before the product is in the stream's queue
                yield self._fill(stored, dtype)

    def _fill(self, stored: QuantizedTensor, dtype: torch.dtype) -> torch.Tensor:
        elements = math.prod(stored.shape)
        buffer = self.reserve(elements, stored.codes.device, dtype)
        return dequantize_into(stored, buffer[:elements].view(stored.shape))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scratch":
        return self

    def __reduce__(self) -> Any:
        return shared_scratch, ()


_shared: "weakref.WeakValueDictionary[str, Scratch]" = weakref.WeakValueDictionary()
_shared_lock = threading.Lock()


def shared_scratch() -> Scratch:
    """The scratch of this process; it is freed with the last layer that holds it."""
    with _shared_lock:
        scratch = _shared.get("scratch")
        if scratch is None:
            scratch = _shared["scratch"] = Scratch()
        return scratch
