"""Device memory that another process may map: the one door to the CUDA driver's own calls.

torch's allocator cuts its tensors out of larger segments, and an IPC handle names a whole
allocation: handing one out would show a peer whatever else lies in that segment. So a landing
window is allocated here, by itself. The driver (libcuda) is called rather than the runtime, whose
library has another name in every release and lies where pip put it.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvtransfer.errors import TransportError, TransportUnavailableError

HANDLE_BYTES = 64
"""Size of CUipcMemHandle."""

_LAZY_ENABLE_PEER_ACCESS = 1
"""The only flag that cuIpcOpenMemHandle takes."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuGetErrorString": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
    "cuDeviceGet": [ctypes.POINTER(ctypes.c_int), ctypes.c_int],
    "cuDeviceGetPCIBusId": [ctypes.c_char_p, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(ctypes.c_void_p), ctypes.c_int],
    "cuCtxPushCurrent_v2": [ctypes.c_void_p],
    "cuCtxPopCurrent_v2": [ctypes.POINTER(ctypes.c_void_p)],
    "cuMemAlloc_v2": [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t],
    "cuMemGetAddressRange_v2": [
        ctypes.POINTER(ctypes.c_uint64),
        ctypes.POINTER(ctypes.c_size_t),
        ctypes.c_uint64,
    ],
    "cuMemcpyDtoH_v2": [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t],
    "cuIpcGetMemHandle": [ctypes.POINTER(_Handle), ctypes.c_uint64],
    "cuIpcOpenMemHandle_v2": [ctypes.POINTER(ctypes.c_uint64), _Handle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [ctypes.c_uint64],
}


@cache
def _driver() -> ctypes.CDLL:
    """Raises TransportUnavailableError where there is no CUDA driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise TransportUnavailableError(f"no CUDA driver is to be had here: {error}") from error
    return library


def _call(name: str, *arguments: Any) -> None:
    _check(name, getattr(_driver(), name)(*arguments))


def _check(name: str, status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        why = text.value.decode() if text.value else "unknown"
        raise TransportError(f"{name}: CUDA error {status} ({why})")


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """torch's own context of the device, current on this thread."""
    _call("cuInit", 0)
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(number), device.index or 0)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
    _call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


class _Allocation:
    """Bytes at an address, as torch takes them over without a copy."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
        }


def allocate_window(slots: int, slot_bytes: int, device: torch.device) -> torch.Tensor:
    """Zeroed [slots, slot_bytes] uint8: an allocation of its own, which `export_window` takes.

    It is never freed before the process ends: the driver does not say whether a peer still has it
    mapped, and freeing it under a mapping is undefined. Raises TransportError where the device has
    no room.
    """
    address = ctypes.c_uint64()
    with _context(device):
        _call("cuMemAlloc_v2", ctypes.byref(address), slots * slot_bytes)
    window = torch.as_tensor(_Allocation(address.value, (slots, slot_bytes)), device=device)
    window.zero_()
    torch.cuda.synchronize(device)
    return window


def export_window(window: torch.Tensor) -> bytes:
    """The handle under which another process of this host maps the window. Raises TransportError
    where the tensor is not an allocation of its own."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    with _context(window.device):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), window.data_ptr())
        if base.value != window.data_ptr():
            raise TransportError("a landing window must be an allocation of its own to be mapped")
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return bytes(handle.reserved)


def open_window(handle: bytes, device: torch.device) -> int:
    """Maps a peer's window for writes of `device`; its address here. One byte of it is read, so
    that a mapping which does not work shows now and not under a request. Raises TransportError:
    the peer's device is not reachable, or the handle is this process's own."""
    if len(handle) != HANDLE_BYTES:
        raise TransportError(f"an IPC handle of {len(handle)} bytes")
    address, byte = ctypes.c_uint64(), ctypes.c_ubyte()
    with _context(device):
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            _Handle.from_buffer_copy(handle),
            _LAZY_ENABLE_PEER_ACCESS,
        )
        try:
            _call("cuMemcpyDtoH_v2", ctypes.byref(byte), address, 1)
        except TransportError:
            _call("cuIpcCloseMemHandle", address)
            raise
    return address.value


def copy_async(target: int, source: int, size: int, stream: torch.cuda.Stream) -> None:
    """Copies `size` bytes between two addresses of device or pinned host memory, behind what the
    stream does, by a copy engine: no kernel takes part. The stream's device must be the current
    one. Raises TransportError where it cannot start.
    """
    # Holding the GIL: the call takes microseconds, getting the GIL back may take many more.
    status = _copy()(target, source, size, stream.cuda_stream)
    if status:
        _check("cuMemcpyAsync", status)


def copy_all_async(
    targets: Sequence[int], sources: Sequence[int], sizes: Sequence[int], stream: torch.cuda.Stream
) -> None:
    """`copy_async` of each, in any order, by one call where the driver has it (12.8 and later)."""
    batch = _batch()
    if batch is None or len(sizes) == 1:
        for target, source, size in zip(targets, sources, sizes, strict=True):
            copy_async(target, source, size, stream)
        return
    count = len(sizes)
    attributes = _CopyAttributes(source_order=_IN_STREAM_ORDER)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
    status = batch(
        (ctypes.c_uint64 * count)(*targets),
        (ctypes.c_uint64 * count)(*sources),
        (ctypes.c_size_t * count)(*sizes),
        count,
        ctypes.byref(attributes),
        ctypes.byref(first),
        1,
        ctypes.byref(failed),
        stream.cuda_stream,
    )
    if status:
        _check("cuMemcpyBatchAsync", status)


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes. The locations are hints; zero: none."""

    _fields_ = [
        ("source_order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    ]


_IN_STREAM_ORDER = 1
"""CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: a source is read behind what the stream does."""


@cache
def _batch() -> Any:
    """As of CUDA 12.8; what 13 changed has another symbol."""
    function = getattr(ctypes.PyDLL("libcuda.so.1"), "cuMemcpyBatchAsync", None)
    if function is not None:
        function.argtypes = [
            *[ctypes.c_void_p] * 3,
            ctypes.c_size_t,
            *[ctypes.c_void_p] * 2,
            ctypes.c_size_t,
            *[ctypes.c_void_p] * 2,
        ]
        function.restype = ctypes.c_int
    return function


@cache
def _copy() -> Any:
    function = ctypes.PyDLL("libcuda.so.1").cuMemcpyAsync
    function.argtypes = [ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function


def close_window(address: int, device: torch.device) -> None:
    """Ends a mapping; no write may be using it. A dead peer's memory stays until then."""
    with _context(device):
        _call("cuIpcCloseMemHandle", address)


def device_name(device: torch.device) -> str:
    """The accelerator's PCI address (`0000:1b:00.0`), as sysfs and nvidia-smi know it; `cpu` for
    host memory."""
    if device.type != "cuda":
        return "cpu"
    _call("cuInit", 0)
    number, text = ctypes.c_int(), ctypes.create_string_buffer(32)
    _call("cuDeviceGet", ctypes.byref(number), device.index or 0)
    _call("cuDeviceGetPCIBusId", text, len(text), number)
    domain, _, place = text.value.decode().lower().partition(":")
    return f"{domain[-4:]}:{place}"
