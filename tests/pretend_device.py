"""A GPU without a GPU: a device whose tensors hold real data on the CPU, but refuse to mix with CPU tensors.

torch calls the device "meta". Each operation runs on the real data. Operations that make the host wait for a
real GPU are recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Their result, or its size, depends on values that the device still computes.
WAITS = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.equal,
}


class PretendTensor(torch.Tensor):
    """A tensor of the pretend device; `held` has its values."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=DEVICE,
        )

    def __init__(self, real: torch.Tensor):
        self.held = real

    def __repr__(self):
        return f"PretendTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} outside of PretendDevice")


class _TensorFunction(TorchFunctionMode):
    """torch.tensor(values, device=...) would drop the values, as there are none on the device "meta"."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            del kwargs["device"]
            return function(*args, **kwargs).to(DEVICE)
        return function(*args, **kwargs)


class PretendDevice(TorchDispatchMode):
    """Inside this block the device exists. `waits` are the names of the operations that waited for it."""

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.function_mode = _TensorFunction()

    def __enter__(self):
        self.function_mode.__enter__()
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        self.function_mode.__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors: list[torch.Tensor] = []
        real_args, real_kwargs = _replace(args, tensors, _held), _replace(kwargs, tensors, _held)
        on_device = [x for x in tensors if isinstance(x, PretendTensor)]
        to_device = kwargs.get("device")
        if on_device:
            is_move = function in (aten._to_copy.default, aten.copy_.default)
            if not is_move and any(x.dim() and not isinstance(x, PretendTensor) for x in tensors):
                raise RuntimeError(f"{function} mixes tensors of the device and of the CPU")
            self._record_wait(function, args, to_device)
        if to_device == DEVICE:
            real_kwargs["device"] = torch.device("cpu")
        result = function(*real_args, **real_kwargs)
        if to_device != DEVICE and (to_device or not on_device):
            return result
        known = {id(x.held): x for x in on_device}  # an operation in place returns its argument
        return _replace(result, [], lambda x: known[id(x)] if id(x) in known else PretendTensor(x))

    def _record_wait(self, function, args, to_device) -> None:
        name = function.overloadpacket
        if name in WAITS or (to_device is not None and to_device != DEVICE):
            self.waits.append(str(name))
        if function is aten.copy_.default and not isinstance(args[0], PretendTensor):
            self.waits.append(str(name))
        if name is aten.index and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits.append(str(name))


def _held(x: torch.Tensor) -> torch.Tensor:
    return x.held if isinstance(x, PretendTensor) else x


def _replace(value: Any, found: list[torch.Tensor], function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply `function` to the tensors in nested lists, tuples and dictionaries, and list them in `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return function(value)
    if isinstance(value, list | tuple):
        return type(value)([_replace(item, found, function) for item in value])
    if isinstance(value, dict):
        return {key: _replace(item, found, function) for key, item in value.items()}
    return value
