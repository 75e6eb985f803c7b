"""Products by an algorithm of cuBLASLt that whoever calls has chosen.

A library takes the first of the algorithms that its rules name for a product. They name eight or
so, and another is often faster: on an H200 the 28,672 x 4,096 weight of an 8B Llama by 8,192 rows
in 2,767 us for 2,901, by 256 rows in 97.7 for 107.5. torch has no way to ask for it.
"""

import ctypes
from collections.abc import Sequence
from functools import cache

import torch

_MOST = 8
"""Algorithms that are asked for."""

_WORKSPACE_BYTES = 32 << 20
"""As much as the libraries themselves keep on a Hopper GPU."""

_ALIGNED_BYTES = 256
"""What an algorithm is chosen for, of all addresses."""

_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}
_COMPUTE_FLOAT32 = 68
_TRANSPOSE_A = 3
_TRANSPOSED = ctypes.c_int32(1)
_COLUMNS = 3
_MAX_WORKSPACE = 1
_REDUCTIONS = 3
_EXACT_REDUCTIONS = ctypes.c_uint32(1 | 2)
"""In place or in float32, never rounded to the output between parts of a sum."""

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)


class _Algorithm(ctypes.Structure):
    _fields_ = (("data", ctypes.c_uint64 * 8),)


class _Found(ctypes.Structure):
    _fields_ = (
        ("algorithm", _Algorithm),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class BlasError(RuntimeError):
    """A call of the library failed; the number is its status."""


class _Library:
    """One device's handle and workspace. Products follow one another, so one room is enough."""

    def __init__(self, device: torch.device) -> None:
        """Raises OSError where the library cannot be had, BlasError where it does not work."""
        major = (torch.version.cuda or "").partition(".")[0]
        self._functions = ctypes.CDLL(f"libcublasLt.so.{major}")
        self.handle = ctypes.c_void_p()
        self.call("Create", ctypes.byref(self.handle))
        self.workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def call(self, function: str, *arguments: object) -> None:
        status = getattr(self._functions, "cublasLt" + function)(*arguments)
        if status:
            raise BlasError(f"cublasLt{function}: status {status}")


class _Problem:
    """x @ weight.T for any number of rows of x: to the library, which counts columns first, the
    transposed weight times x."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> None:
        library = self._library = _library(device)
        columns, depth = shape
        self._operation = ctypes.c_void_p()
        library.call("MatmulDescCreate", ctypes.byref(self._operation), _COMPUTE_FLOAT32, 0)
        self._set("MatmulDesc", self._operation, _TRANSPOSE_A, _TRANSPOSED)
        self._weight = self._layout(dtype, depth, columns)
        self._x = self._layout(dtype, depth, 1)
        self._out = self._layout(out_dtype, columns, 1)
        self._rows = 1
        self._fits: dict[bytes, bool] = {}

    def algorithms(self, rows: int, most: int = _MOST) -> list[_Algorithm]:
        """What the library's rules name, their favourite first."""
        library, preference = self._library, ctypes.c_void_p()
        library.call("MatmulPreferenceCreate", ctypes.byref(preference))
        limit = ctypes.c_size_t(_WORKSPACE_BYTES)
        self._set("MatmulPreference", preference, _MAX_WORKSPACE, limit)
        self._set("MatmulPreference", preference, _REDUCTIONS, _EXACT_REDUCTIONS)
        self._use(rows)
        found, count = (_Found * most)(), ctypes.c_int()
        library.call(
            "MatmulAlgoGetHeuristic",
            *(library.handle, self._operation, *self._layouts(), preference),
            *(most, found, ctypes.byref(count)),
        )
        library.call("MatmulPreferenceDestroy", preference)
        return [one.algorithm for one in found[: count.value] if one.state == 0]

    def run(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        algorithm: _Algorithm,
        *,
        added: bool = False,
    ) -> bool:
        """False, and nothing done, where the algorithm is none for so many rows. `added`: to what
        `out` holds."""
        library = self._library
        self._use(x.shape[0])
        key = bytes(algorithm)
        if key not in self._fits:
            self._fits[key] = self._check(algorithm)
        if not self._fits[key]:
            return False
        weight_at, x_at, out_at = (
            ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, out)
        )
        operand, other, result, _ = self._layouts()
        library.call(
            "Matmul",
            *(library.handle, self._operation, ctypes.byref(_ONE)),
            *(weight_at, operand, x_at, other, ctypes.byref(_ONE if added else _ZERO)),
            *(out_at, result),
            *(out_at, result, ctypes.byref(algorithm)),
            ctypes.c_void_p(library.workspace.data_ptr()),
            ctypes.c_size_t(_WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
        return True

    def _check(self, algorithm: _Algorithm) -> bool:
        library, found = self._library, _Found()
        try:
            library.call(
                "MatmulAlgoCheck",
                *(library.handle, self._operation, *self._layouts()),
                *(ctypes.byref(algorithm), ctypes.byref(found)),
            )
        except BlasError:
            return False
        return int(found.workspace_bytes) <= _WORKSPACE_BYTES

    def _use(self, rows: int) -> None:
        if rows != self._rows:
            for layout in (self._x, self._out):
                self._set("MatrixLayout", layout, _COLUMNS, ctypes.c_uint64(rows))
            self._rows = rows
            self._fits.clear()

    def _layouts(self) -> tuple[ctypes.c_void_p, ...]:
        return self._weight, self._x, self._out, self._out

    def _layout(self, dtype: torch.dtype, rows: int, columns: int) -> ctypes.c_void_p:
        layout, shape = ctypes.c_void_p(), (ctypes.c_uint64(rows), ctypes.c_uint64(columns))
        self._library.call(
            "MatrixLayoutCreate", ctypes.byref(layout), _TYPES[dtype], *shape, ctypes.c_int64(rows)
        )
        return layout

    def _set(
        self,
        kind: str,
        of: ctypes.c_void_p,
        attribute: int,
        value: ctypes.c_int32 | ctypes.c_uint32 | ctypes.c_uint64 | ctypes.c_size_t,
    ) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        self._library.call(f"{kind}SetAttribute", of, attribute, ctypes.byref(value), size)


class BlasProduct:
    """x @ weight.T for weights of one shape, by one algorithm."""

    def __init__(self, problem: _Problem, algorithm: _Algorithm) -> None:
        self._problem = problem
        self._algorithm = algorithm

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, added: bool = False
    ) -> bool:
        """`out` [t, n] for x [t, k] and weight [n, k]; `added`: to what it holds. False, and
        nothing done, where the algorithm is not made for so many rows or for how the tensors
        lie."""
        lies = x.data_ptr() | weight.data_ptr() | out.data_ptr()
        if lies % _ALIGNED_BYTES or not (x.is_contiguous() and weight.is_contiguous()):
            return False
        return self._problem.run(x, weight, out, self._algorithm, added=added)


def blas_products(rows: int, weight: torch.Tensor, out_dtype: torch.dtype) -> Sequence[BlasProduct]:
    """Those of the library's algorithms that its rules name for `rows` rows and weights like this
    one; none where there is no such library."""
    if not weight.is_cuda or weight.dtype not in _TYPES:
        return ()
    columns, depth = weight.shape
    return _products(rows, weight.device, (columns, depth), weight.dtype, out_dtype)


@cache
def _products(
    rows: int,
    device: torch.device,
    shape: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> Sequence[BlasProduct]:
    try:
        problem = _problem(device, shape, dtype, out_dtype)
        return tuple(BlasProduct(problem, found) for found in problem.algorithms(rows))
    except (OSError, BlasError):
        return ()


@cache
def _problem(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype, out_dtype: torch.dtype
) -> _Problem:
    return _Problem(device, shape, dtype, out_dtype)


@cache
def _library(device: torch.device) -> _Library:
    return _Library(device)
