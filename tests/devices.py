"""Two devices that need no GPU: their tensors claim to be elsewhere, and are computed on the CPU.

On both, an operation on tensors of two devices raises, as on a GPU. ``cuda`` is PyTorch's own `FakeTensorMode`, which
needs the CUDA build and has no backward pass; ``paper`` is a backend in Python, which has one in any build. ``gpu``
is a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

NEEDS_CUDA_BUILD = "needs the CUDA build of PyTorch, but no GPU: torch.version.cuda is None"
PAPER = "paper"
MOVES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from")
"""Operations from one device to another."""


def real(tensor: Any) -> Tensor:
    """Return the values of a tensor on any device as a plain one on the CPU."""
    found: Tensor = getattr(tensor.detach(), "value", tensor.detach())
    return found.cpu()


def lowered(arguments: Any) -> Any:
    """Return arguments of an operation as it is computed on the CPU."""

    def lower(value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else getattr(value, "value", value)

    return tree_map(lower, arguments)


@contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """In this context there are tensors on ``cuda``, ``paper`` or ``gpu``."""
    make = torch.tensor

    def moved(*args: Any, device: Any = None, **options: Any) -> Tensor:
        return make(*args, **options).to(device)  # which torch.tensor cannot do for a backend of Python

    if name == "cuda":
        with (
            FakeCuda(allow_non_fake_inputs=True),
            patch("torch.UntypedStorage.data_ptr", lambda storage: storage._cdata),
            patch("torch.utils.swap_tensors", move),
            patch("torch.cuda.get_rng_state", lambda device: torch.get_rng_state()),
            patch("torch.cuda.set_rng_state", lambda state, device: torch.set_rng_state(state)),
        ):
            yield torch.device(name, 0)
    elif name == "gpu":
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield torch.device("cuda", 0)
    else:
        register_paper()
        with patch("torch.tensor", moved):
            yield torch.device(name, 0)


class FakeCuda(FakeTensorMode):
    """Its tensors know their values, so that code may wait for these; those of the CPU are real."""

    _nested = False
    """Whether an operation is a part of one whose values are known."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        wrapped = any(
            is_traceable_wrapper_subclass(leaf) for leaf in leaves
        )  # operations on its parts follow
        if self._nested or wrapped or func is torch.ops.prim.device.default:
            return super().dispatch(func, types, args, kwargs)
        options = {name: value for name, value in lowered(kwargs).items() if name != "pin_memory"}
        values = func(*lowered(args), **options)
        places = [getattr(leaf, "device", leaf) for leaf in leaves]
        on_cuda = any(isinstance(place, torch.device) and place.type == "cuda" for place in places)
        if not on_cuda or not any(isinstance(value, Tensor) for value in tree_leaves(values)):
            return values
        self._nested = True
        try:
            out = super().dispatch(func, types, *tree_map(self._as_fake, (args, kwargs)))
        except (DataDependentOutputException, DynamicOutputShapeException):  # its shape depends on values
            out = tree_map(lambda value: FakeTensor(self, value.to("meta"), torch.device("cuda", 0)), values)
        finally:
            self._nested = False
        fakes, structure = tree_flatten(out)
        pairs = zip(fakes, tree_leaves(values), strict=True)
        return tree_unflatten([self._with_value(*pair) for pair in pairs], structure)

    def _as_fake(self, value: Any) -> Any:
        """Return a plain tensor of the CPU as one of this mode."""
        return self.from_tensor(value) if type(value) in (Tensor, nn.Parameter) else value

    @staticmethod
    def _with_value(fake: Any, value: Any) -> Any:
        if not isinstance(fake, FakeTensor) or fake.device.type == "cpu":
            return value
        fake.value, fake.constant = value, None  # type: ignore[attr-defined]
        return fake


def move(parameter: Any, moved: Any, swap: Callable[[Any, Any], None] = torch.utils.swap_tensors) -> None:
    """Give a parameter the place of another tensor. PyTorch swaps the two, but the mode refers to fake ones."""
    if not isinstance(parameter, FakeTensor):
        return swap(parameter, moved)
    assert parameter.dtype == moved.dtype
    parameter.fake_device, parameter.value = moved.device, real(moved)  # type: ignore[attr-defined]


class PaperTensor(Tensor):
    """A tensor on ``paper``, whose values are on the CPU."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> "PaperTensor":
        layout = dict(strides=value.stride(), storage_offset=value.storage_offset(), dtype=value.dtype)
        out: PaperTensor = Tensor._make_wrapper_subclass(
            cls, value.shape, **layout, device=torch.device(PAPER, 0)
        )  # type: ignore[attr-defined]
        out.value = value
        return out

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.value.tolist()

    def __getitem__(self, index: Any) -> Tensor:  # PyTorch cannot do it with a list
        return super().__getitem__(
            torch.tensor(index, device=self.device) if isinstance(index, list) else index
        )

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.value.untyped_storage()

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: "PaperTensor") -> None:
        with no_dispatch():
            Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.value = other.value


def compute(func: Any, args: Any, kwargs: Any) -> Any:
    """Compute an operation of ``paper``. Raises RuntimeError if tensors, but for scalars, are on two devices."""
    name = func._schema.name
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    devices = {tensor.device for tensor in tensors if tensor.ndim or tensor.device.type == PAPER}
    if len(devices) > 1 and name not in MOVES:
        shapes = ", ".join(f"{tensor.device} {list(tensor.shape)}" for tensor in tensors)
        raise RuntimeError(f"{name}: tensors on two devices: {shapes}")
    out = func(*lowered(args), **lowered(kwargs))
    for tensor in tensors:
        if tensor.shape != getattr(tensor, "value", tensor).shape:  # an output that was resized
            tensor.data = PaperTensor(tensor.value)  # type: ignore[attr-defined]
    target = kwargs.get("device") or (
        args[0].device if name == "aten::copy_" else max(devices, key=str, default="cpu")
    )
    if torch.device(target).type != PAPER:
        return out
    on_paper = tree_map(lambda value: PaperTensor(value) if isinstance(value, Tensor) else value, out)
    return return_and_correct_aliasing(func, args, kwargs, on_paper)


class PaperModule:
    """What PyTorch asks the module of a backend."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def get_rng_state(self, device: Any) -> Tensor:
        return torch.get_rng_state()  # on the CPU its numbers are drawn

    def set_rng_state(self, state: Tensor, device: Any) -> None:
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def register_paper() -> torch.library.Library:
    """Register the backend for as long as the process lives, before its first backward pass, which counts devices."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(PAPER, PaperModule())
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: compute(func, args, kwargs), "PrivateUse1")
    return library
