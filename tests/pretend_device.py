"""A GPU without a GPU: a device whose tensors hold real data on the CPU, but refuse to mix with CPU tensors.

torch calls the device "meta". Each operation runs on the real data. Operations that make the host wait for a
real GPU are recorded.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("meta")
aten = torch.ops.aten
# Their result, or its size, depends on values that the device still computes.
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal}


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
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_device = [x for x in tensors if isinstance(x, PretendTensor)]
        to_device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        is_move = function in (aten._to_copy.default, aten.copy_.default)
        if on_device and not is_move and any(x.dim() for x in tensors if not isinstance(x, PretendTensor)):
            raise RuntimeError(f"{function} mixes tensors of the device and of the CPU")
        if on_device:
            self._record_wait(function, args, to_device)
        if to_device == DEVICE:
            kwargs["device"] = torch.device("cpu")
        real = tree_map(lambda x: x.held if isinstance(x, PretendTensor) else x, (args, kwargs))
        result = function(*real[0], **real[1])
        stays = to_device == DEVICE or (on_device and to_device is None)
        known = {id(x.held): x for x in on_device}  # an operation in place returns its argument

        def wrap(x):
            return (known[id(x)] if id(x) in known else PretendTensor(x)) if isinstance(x, torch.Tensor) and stays else x

        return tree_map(wrap, result)

    def _record_wait(self, function, args, to_device) -> None:
        name = function.overloadpacket
        if name in WAITS or (to_device is not None and to_device != DEVICE):
            self.waits.append(str(name))
        if function is aten.copy_.default and not isinstance(args[0], PretendTensor):
            self.waits.append(str(name))
        if name is aten.index and any(x is not None and x.dtype == torch.bool for x in args[1]):
            self.waits.append(str(name))
