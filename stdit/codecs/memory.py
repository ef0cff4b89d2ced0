"""Memory that decoding takes, counted without decoding: the decoder runs on tensors that have sizes and no values.

Letters: B batch, C latent channels; T' H' W' frames, rows and columns of the latents; N images or videos in a
convolution.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

CHANNEL_BLOCK = 16
"""Channels that the CPU's convolutions of images and videos handle together (oneDNN)."""
ONEDNN_VALUES = 20480
"""Values in the first four dimensions of a single input up to which PyTorch convolves without oneDNN."""
_REPLACED = ("forward", "_hf_hook")
"""What accelerate and diffusers set on modules whose weights they offload."""


def decoding_bytes(codec: Any, latent_shape: tuple[int, int, int], batch_size: int = 1) -> int:
    """Return the peak bytes that decoding latents takes, all at once; those of the weights are not counted.

    Of convolutions it counts what oneDNN's take on a CPU, besides their input and output; those of cuDNN may take
    less. It computes nothing: 51 frames take seconds, whatever their size, longer videos longer. The codec's weights
    may be anywhere, also on the meta device.

    Args:
        codec: a `VideoCodec`.
        latent_shape: T', H', W'.
        batch_size: B.
    """
    device = torch.device("cpu") if codec.device.type == "meta" else codec.device
    with torch.no_grad(), _without_offloading(codec), FakeTensorMode(allow_non_fake_inputs=True):
        tensors = dict([*codec.named_parameters(), *codec.named_buffers()])
        weights = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
        with StorageCounter(weights.values()) as counter:
            latents = torch.empty(batch_size, codec.channels, *latent_shape, device=device)
            arguments = (codec._decode_frames, latents, codec.pixel_shape(*latent_shape)[0])
            video = functional_call(codec, weights, arguments)
            video = video.float().clamp(-1, 1)  # as `VideoCodec.decode` ends
    return counter.peak


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate, as long as these live.

    Args:
        known: tensors whose storages do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._seen = WeakIdKeyDictionary({tensor.untyped_storage(): None for tensor in known})

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._seen:
                self._add(tensor.untyped_storage())
        convolves = function is torch.ops.aten.convolution.default
        workspace = convolution_workspace(args[0], args[1], out) if convolves else 0
        self.peak = max(self.peak, self.bytes + workspace)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._seen[storage] = None
        self.bytes += storage.nbytes()
        finalize(storage, self._free, storage.nbytes())

    def _free(self, size: int) -> None:
        self.bytes -= size


def convolution_workspace(x: Tensor, weight: Tensor, out: Tensor) -> int:
    """Return the bytes that a convolution takes on a CPU, besides its input ``x [N ...]``, weight and output.

    oneDNN copies input and weight to a layout of its own, in which it computes the output, frees the input's copy,
    and copies the output back. Otherwise the values below each output are copied side by side. That was measured
    (tests/codecs/test_decoding_memory.py).
    """
    if not _by_onednn(x, weight):
        return 0 if weight[0, 0].numel() == 1 else weight[0].numel() * out[:, 0].nbytes
    channels_last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    if x.is_contiguous(memory_format=channels_last):
        if len(x) > 1:
            return 0
        copied = 0  # alone, it has both layouts
    else:
        copied = 0 if x.is_contiguous() else x.nbytes
    if weight[0, 0].numel() == 1 and x.dtype == torch.float32:
        return copied
    channels = out.shape[1]
    blocked = out.nbytes // channels * (-(-channels // CHANNEL_BLOCK) * CHANNEL_BLOCK)
    return copied + weight.nbytes + max(x.nbytes + blocked - out.nbytes, blocked)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return whether PyTorch gives a convolution to oneDNN: `ConvParams::use_mkldnn`, but for strides and groups."""
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return True
    height, width = weight.shape[-2:]
    pointwise = height == width == 1 and len(x) < 16 and torch.get_num_threads() == 1
    return not pointwise and (len(x) > 1 or min(height, width) > 3 or x.shape[:4].numel() > ONEDNN_VALUES)


@contextmanager
def _without_offloading(module: nn.Module) -> Iterator[None]:
    """Let modules compute without fetching their weights from elsewhere."""
    states = [part.__dict__ for part in module.modules()]
    taken = [{name: state.pop(name) for name in _REPLACED if name in state} for state in states]
    try:
        yield
    finally:
        for state, own in zip(states, taken, strict=True):
            state.update(own)
