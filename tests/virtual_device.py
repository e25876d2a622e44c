"""A virtual accelerator: tensors that say they live elsewhere, refuse to meet CPU tensors, and count the host's waits.

    with virtual_device() as ledger:
        pipe.to(DEVICE)
        out = pipe("a fox", generator=0)  # the tokens of the CPU, or the error that a GPU would raise
    print(ledger.reads, ledger.uploads)

Every operation is done on a CPU tensor inside, so random numbers and results are those of the CPU. For the dispatcher the
tensors are on `meta`, whose device guard does nothing; `tensor.device` and everything that names a device say `DEVICE`.

Not there: autocast (it does nothing), Triton kernels, CUDA graphs and streams, `torch.Generator(device)`. Pinned
memory is ordinary memory that is remembered as pinned.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import unidiff

DEVICE = torch.device("privateuseone", 0)
PACKAGE = str(Path(unidiff.__file__).parent)
aten = torch.ops.aten
READS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
    "is_nonzero", "equal", "allclose", "bincount", "_linalg_check_errors",
}  # fmt: skip
"""Operations whose result the host looks at, or whose size the device decides."""
MOVES = {"_to_copy", "copy_", "copy"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Ledger:
    """What the host waited for.

    Attributes:
        reads: by (place, kind): results that were asked for. Place is `file.py:function` of the package, or "" outside of it.
        uploads: by the same: CPU tensors that were sent over, which waits as well unless memory is pinned.
        lines: of both, by place, kind and line.
    """

    def __init__(self) -> None:
        self.reads: Counter[tuple[str, str]] = Counter()
        self.uploads: Counter[tuple[str, str]] = Counter()
        self.lines: Counter[tuple[str, str, int]] = Counter()

    def read(self, kind: str) -> None:
        self._note(self.reads, kind)

    def upload(self, kind: str) -> None:
        self._note(self.uploads, kind)

    def _note(self, where: Counter[tuple[str, str]], kind: str) -> None:
        frame: Any = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        place, line = "", 0
        if frame is not None:
            code = frame.f_code
            place, line = f"{code.co_filename[len(PACKAGE) + 1 :]}:{code.co_qualname}", frame.f_lineno
        where[place, kind] += 1
        self.lines[place, kind, line] += 1


_ledgers: list[Ledger] = []


def _read(kind: str) -> None:
    for ledger in _ledgers:
        ledger.read(kind)


def _upload(kind: str) -> None:
    for ledger in _ledgers:
        ledger.upload(kind)


class VirtualTensor(Tensor):
    """A tensor on the virtual device; `inside` is the CPU tensor with its values."""

    inside: Tensor
    is_meta = is_cpu = is_cuda = False
    device = DEVICE  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inside: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # `type(parameter)(values, requires_grad=...)`
            return torch.nn.Parameter(inside, requires_grad)
        made = Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            layout=inside.layout, device="meta",
        )  # fmt: skip
        made.inside = inside
        return made

    def __init__(self, inside: Tensor, requires_grad: bool | None = None) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        _read("repr")
        return f"VirtualTensor({self.inside})"

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.dim() == 0 else repr(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> Any:
        _read("tolist")
        return self.inside.tolist()

    def numpy(self, **_: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"a tensor on {DEVICE} has no numpy array; use .cpu() first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.inside.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inside.untyped_storage()

    def get_device(self) -> int:
        return 0

    def is_pinned(self, device: Any = None) -> bool:
        return False

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or DEVICE, requires_grad=requires_grad)

    def to(self, device: Any = None, dtype: Any = None, *flags: bool, **more: Any) -> Tensor:  # type: ignore[override]
        """As for every tensor: itself where nothing changes. (The dispatcher sees another device and would copy.)"""
        if isinstance(device, torch.dtype):
            device, dtype, flags = None, device, flags if dtype is None else (dtype, *flags)
        elif isinstance(device, Tensor):
            device, dtype, flags = device.device, device.dtype, flags if dtype is None else (dtype, *flags)
        if device is None or _is_there(device):
            return super().to(dtype or self.dtype, *flags, **more)
        return super().to(device, dtype, *flags, **more)

    @property
    def data(self) -> Any:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: VirtualTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        if isinstance(self, VirtualTensor):  # the same still
            self.inside = value.inside

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(_sent(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_sent(index), value)


def _sent(index: Any) -> Any:
    """An index whose lists are tensors on the device, as torch would make them there."""
    if isinstance(index, tuple):
        return tuple(_sent(part) for part in index)
    return torch.tensor(index, device=DEVICE) if isinstance(index, list) else index


class _Calls(TorchFunctionMode):
    """Looks at calls before the dispatcher does, for what the latter would not see.

    - Whether a program itself asks for `meta`; operations that are made of others do so for tensors on the device.
    - Tensors made of data, which torch reads on the CPU and sends over behind the dispatcher's back.
    - The device without its index, for which torch would ask a driver.
    - `tensor.data = ` one of the other device, which torch takes from drivers that it knows.
    """

    now = threading.local()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.pin_memory:
            made = args[0].clone()
            made.pinned = True
            return made
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return _made_of(func, *args, **kwargs)
        if func == Tensor.data.__set__ and isinstance(args[0], VirtualTensor) != isinstance(args[1], VirtualTensor):  # type: ignore[attr-defined]
            kind = torch.nn.Parameter if isinstance(args[0], torch.nn.Parameter) else Tensor.requires_grad_
            return torch.utils.swap_tensors(args[0], kind(args[1].detach(), args[0].requires_grad))
        device = kwargs.get("device") or next((arg for arg in args if isinstance(arg, torch.device | str)), None)
        if str(device) == DEVICE.type:
            kwargs = {name: DEVICE if value is device else value for name, value in kwargs.items()}
            args = tuple(DEVICE if arg is device else arg for arg in args)
        if str(device) != "meta" or isinstance(func, OpOverload):
            return func(*args, **kwargs)
        before, self.now.meta = getattr(self.now, "meta", False), True
        try:
            return func(*args, **kwargs)
        finally:
            self.now.meta = before


def _made_of(
    make: Callable[..., Tensor], data: Any, *args: Any, device: Any = None, requires_grad: bool = False, **kwargs: Any
) -> Tensor:
    if isinstance(data, VirtualTensor):
        made = data.detach().clone() if make is torch.tensor else data
        return made.to(DEVICE if device is None else device, *args, **kwargs)
    if device is not None and torch.device(device).type != DEVICE.type:
        return make(data, *args, device=device, **kwargs).requires_grad_(requires_grad)
    made = make(data, *args, **kwargs)
    return (made if device is None else made.to(DEVICE)).requires_grad_(requires_grad or made.requires_grad)


def _is_there(device: Any) -> bool:
    if device is None:
        return False
    kind = torch.device(device).type
    return kind == DEVICE.type or (kind == "meta" and not getattr(_Calls.now, "meta", False))


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map(function, part) for part in value)
    return function(value)


def _tensors(value: Any, found: list[Tensor]) -> list[Tensor]:
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, list | tuple):
        for part in value:
            _tensors(part, found)
    return found


def _inside(value: Any) -> Any:
    if isinstance(value, VirtualTensor):
        return value.inside
    return torch.device("cpu") if isinstance(value, torch.device) and _is_there(value) else value


def _wrapped(value: Any) -> Any:
    return VirtualTensor(value) if type(value) is Tensor else value


@cache
def _name(func: Any) -> str:
    return func._schema.name.partition("::")[2]


@cache
def _written(func: Any) -> tuple[int | str, ...]:
    """Arguments that the operation returns after writing in them."""
    arguments = func._schema.arguments
    return tuple(
        argument.name if argument.kwarg_only else number
        for number, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    found = _tensors([*args, *kwargs.values()], [])
    there = any(isinstance(x, VirtualTensor) for x in found)
    name, device = _name(func), kwargs.get("device")
    to = _is_there(device)
    if not there and not to:
        return func(*args, **kwargs)
    here = [x for x in found if not isinstance(x, VirtualTensor)]
    if name in MOVES:
        return _move(func, name, args, kwargs, there, to)
    if here and there:
        _refuse(func, name, args, here)
    if there and name in READS:
        _read(name)
    if name == "repeat_interleave" and there and kwargs.get("output_size") is None:
        _read(name)
    if name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        _read(f"{name} with a mask")
    out = func(*_map(_inside, args), **{key: _map(_inside, value) for key, value in kwargs.items()})
    written = _written(func)
    if len(written) == 1 and isinstance(out, Tensor):
        return args[written[0]] if isinstance(written[0], int) else kwargs[written[0]]
    if written and isinstance(out, tuple):
        return tuple(args[w] if isinstance(w, int) else kwargs[w] for w in written)
    if device is not None and not to:
        _read(name)
        return out
    return _map(_wrapped, out)


def _move(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], there: bool, to: bool) -> Any:
    """Copies between the CPU and the device, and those that only change the dtype."""
    if name == "_to_copy":
        source = args[0]
        from_there = isinstance(source, VirtualTensor)
        plain = {key: value for key, value in kwargs.items() if key not in ("device", "pin_memory")}
        out = func(_inside(source), *args[1:], **plain)
        if kwargs.get("device") is None:
            to = from_there
        if to and not from_there and not (kwargs.get("non_blocking") and hasattr(source, "pinned")):
            _upload("to the device")
        elif from_there and not to:
            _read("to the CPU")
        return VirtualTensor(out) if to else out
    target, source = args[0], args[1]
    if isinstance(target, VirtualTensor) and not isinstance(source, VirtualTensor):
        _upload(name)
    elif isinstance(source, VirtualTensor) and not isinstance(target, VirtualTensor):
        _read(name)
    out = func(*_map(_inside, args), **kwargs)
    return target if name == "copy_" else VirtualTensor(out)


def _refuse(func: Any, name: str, args: tuple[Any, ...], here: list[Tensor]) -> None:
    """Raise `RuntimeError` where the operation may not take CPU tensors beside those of the device."""
    if any(x.device.type == "meta" for x in here):
        raise RuntimeError(f"{func} got a tensor of `meta`, without values, beside tensors on {DEVICE}")
    numbers = not any(x.dim() for x in here)
    if numbers and (torch.Tag.pointwise in func.tags or name.startswith(("_fused_adam", "_foreach"))):
        return
    if name in INDEXED and isinstance(args[0], VirtualTensor):
        values = [x for x in args[2:3] if isinstance(x, Tensor) and not isinstance(x, VirtualTensor)]
        if not any(x.dim() for x in values):
            _upload(f"{name} with a CPU index")
            return
    shapes = ", ".join(str(tuple(x.shape)) for x in here)
    raise RuntimeError(f"{func}: expected all tensors on {DEVICE}, but those of shape {shapes} are on the CPU")


class _Mode(TorchDispatchMode):
    """Sees tensors being made for the device; what has one among its arguments comes here as well."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_MODULE = SimpleNamespace(
    get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    is_available=lambda: True,
    device_count=lambda: 1,
    current_device=lambda: 0,
    manual_seed_all=lambda seed: None,  # the device has no random numbers of its own
    _lazy_init=lambda: None,
    _is_in_bad_fork=lambda: False,
)
"""What `torch.privateuseone` has to answer."""


@contextmanager
def virtual_device() -> Iterator[Ledger]:
    """Inside, tensors may be made on or moved to `DEVICE`; gives the counts of what the host waited for."""
    ledger = Ledger()
    with ExitStack() as stack:
        stack.enter_context(patch.object(torch, DEVICE.type, _MODULE, create=True))
        name = f"torch.{DEVICE.type}"  # only this one: what is imported meanwhile stays imported
        stack.callback(sys.modules.__setitem__ if name in sys.modules else sys.modules.pop, name, _MODULE)
        sys.modules[name] = _MODULE  # type: ignore[assignment]
        _ledgers.append(ledger)
        stack.callback(_ledgers.remove, ledger)
        stack.enter_context(_Calls())
        stack.enter_context(_Mode())
        yield ledger
