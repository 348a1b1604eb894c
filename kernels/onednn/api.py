"""A thin ctypes layer over oneDNN's C API (`oneapi/dnnl/dnnl.h`): one matmul, described, created, run."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache, lru_cache
from typing import Any

import numpy as np

from xpuquant.errors import DamagedError, EnvironmentFault, UnsupportedError
from xpuquant.kernels.onednn.library import load
from xpuquant.values import frozen

Array = np.ndarray[Any, Any]

# dnnl_common_types.h: dnnl_data_type_t, by the safetensors label (U4, S4 and F4 pack two codes per byte).
DTYPES = {
    "F16": 1,
    "BF16": 2,
    "F32": 3,
    "I32": 4,
    "I8": 5,
    "U8": 6,
    "F8_E5M2": 9,
    "F8_E4M3": 10,
    "S4": 11,
    "U4": 12,
    "F8_E8M0": 13,
    "F4": 14,
}
# dnnl_types.h: execution arguments.
SRC, DST, WEIGHTS, BIAS, SCALES, ZERO_POINTS = 1, 17, 33, 41, 4096, 8192
_FPMATH = {"F32": 0, "BF16": 1, "F16": 2}
_CPU, _GPU = 1, 2
_IMPLEMENTATION = 8  # dnnl_query_impl_info_str
_ALLOCATE = c_void_p(-1)  # DNNL_MEMORY_ALLOCATE
_STATUS = {
    1: "out of memory",
    2: "invalid arguments",
    3: "unimplemented",
    5: "runtime error",
    6: "not required",
    9: "invalid shape",
    10: "invalid data type",
}


@cache
def library() -> ctypes.CDLL:
    """oneDNN with its functions typed, loaded once per process.

    Raises:
        EnvironmentFault: not installed, or the dynamic loader refuses it.
    """
    dnnl = load()
    out, dims = POINTER(c_void_p), POINTER(c_int64)
    quantization = (c_void_p, c_int, c_int, c_int, dims, c_int)
    signatures: dict[str, tuple[Any, ...]] = {
        "engine_create": (out, c_int, c_size_t),
        "stream_create": (out, c_void_p, c_int),
        "stream_destroy": (c_void_p,),
        "stream_wait": (c_void_p,),
        "memory_desc_create_with_strides": (out, c_int, dims, c_int, dims),
        "memory_desc_destroy": (c_void_p,),
        "memory_create": (out, c_void_p, c_void_p, c_void_p),
        "memory_map_data": (c_void_p, out),
        "memory_unmap_data": (c_void_p, c_void_p),
        "memory_destroy": (c_void_p,),
        "primitive_attr_create": (out,),
        "primitive_attr_destroy": (c_void_p,),
        "primitive_attr_set_scales": quantization,
        "primitive_attr_set_zero_points": quantization,
        "primitive_attr_set_fpmath_mode_v2": (c_void_p, c_int, c_int),
        "matmul_primitive_desc_create": (out, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
        "primitive_desc_query": (c_void_p, c_int, c_int, c_void_p),
        "primitive_desc_destroy": (c_void_p,),
        "primitive_create": (out, c_void_p),
        "primitive_execute": (c_void_p, c_void_p, c_int, c_void_p),
        "primitive_destroy": (c_void_p,),
    }
    for name, arguments in signatures.items():
        function = getattr(dnnl, f"dnnl_{name}")
        function.argtypes, function.restype = arguments, c_int
    dnnl.dnnl_engine_get_count.restype = c_size_t
    dnnl.dnnl_memory_desc_get_size.argtypes, dnnl.dnnl_memory_desc_get_size.restype = (c_void_p,), c_size_t
    return dnnl


def _call(name: str, *arguments: Any) -> None:
    status = getattr(library(), f"dnnl_{name}")(*arguments)
    if status:
        raise UnsupportedError(f"oneDNN {name}: {_STATUS.get(status, status)}")


def _new(name: str, *arguments: Any) -> c_void_p:
    handle = c_void_p()
    _call(name, byref(handle), *arguments)
    return handle


@cache
def engine() -> tuple[str, c_void_p]:
    """("gpu" or "cpu", engine): the first Intel GPU where SYCL sees one, otherwise the CPU. To be asked for once before
    several threads do.

    Raises:
        EnvironmentFault: no oneDNN, or SYCL sees no device at all.
    """
    for device, kind in (("gpu", _GPU), ("cpu", _CPU)):
        if library().dnnl_engine_get_count(kind):
            return device, _new("engine_create", kind, 0)
    raise EnvironmentFault(
        "oneDNN sees neither an Intel GPU nor the SYCL CPU device: OCL_ICD_FILENAMES must name "
        "libintelocl.so before the first SYCL library of the process is loaded"
    )


@frozen
class Quantization:
    """Scales or zero points of one argument: which indices have their own (`mask`), and how they group."""

    dtype: str
    mask: int = 0
    groups: tuple[int, ...] = ()


@frozen
class Shape:
    """A tensor as oneDNN sees it. Strides count elements, also of types of four bits."""

    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def rows(cls, dtype: str, *dims: int) -> Shape:
        """A contiguous row-major tensor."""
        return cls(dtype, dims, tuple(math.prod(dims[i + 1 :]) for i in range(len(dims))))


@frozen
class Matmul:
    """`dst {M,N} = src {M,K} · weights {K,N} (+ bias {1,N})` with quantized arguments; hashable.

    scales, zero_points   (argument, quantization) pairs
    fpmath                activation dtype that integer weights are widened to; None leaves the mode alone
    """

    src: Shape
    weights: Shape
    dst: Shape
    bias: Shape | None = None
    scales: tuple[tuple[int, Quantization], ...] = ()
    zero_points: tuple[tuple[int, Quantization], ...] = ()
    fpmath: str | None = None


class _Owned:
    """A C handle, destroyed with its owner; not at exit, where the SYCL runtime may be gone already."""

    def __init__(self, handle: c_void_p, destroy: str) -> None:
        self._as_parameter_ = handle  # ctypes passes this, given the owner, which outlives the call
        weakref.finalize(self, getattr(library(), f"dnnl_{destroy}"), handle).atexit = False


def _describe(shape: Shape) -> _Owned:
    rank = len(shape.dims)
    dims, strides = (c_int64 * rank)(*shape.dims), (c_int64 * rank)(*shape.strides)
    create = "memory_desc_create_with_strides"
    return _Owned(_new(create, rank, dims, DTYPES[shape.dtype], strides), "memory_desc_destroy")


def _attributes(matmul: Matmul) -> _Owned:
    attributes = _Owned(_new("primitive_attr_create"), "primitive_attr_destroy")
    for kind, quantized in (("scales", matmul.scales), ("zero_points", matmul.zero_points)):
        for argument, q in quantized:
            groups = (c_int64 * len(q.groups))(*q.groups)
            dtype = DTYPES[q.dtype]
            setter = f"primitive_attr_set_{kind}"
            _call(setter, attributes, argument, q.mask, len(q.groups), groups, dtype)
    if matmul.fpmath is not None:
        _call("primitive_attr_set_fpmath_mode_v2", attributes, _FPMATH[matmul.fpmath], 1)
    return attributes


def _descriptor(matmul: Matmul) -> _Owned:
    src, weights, dst = (_describe(shape) for shape in (matmul.src, matmul.weights, matmul.dst))
    bias = _describe(matmul.bias) if matmul.bias else None
    attributes = _attributes(matmul)
    created = _new("matmul_primitive_desc_create", engine()[1], src, weights, bias, dst, attributes)
    return _Owned(created, "primitive_desc_destroy")


@lru_cache(maxsize=1024)
def supported(matmul: Matmul) -> bool:
    """Whether oneDNN has an implementation for this engine: by asking it to make one."""
    try:
        _descriptor(matmul)
    except UnsupportedError:
        return False
    return True


_told: dict[Matmul, str] = {}
_asking = threading.Lock()


def reasons(matmul: Matmul, alike: Iterable[Matmul] = ()) -> str:
    """What oneDNN's dispatcher says of the implementations it tried, for a matmul that is not supported.

    It says so only on standard output and only where ONEDNN_VERBOSE was set before it was loaded: hence a
    process of its own, which reads descriptors from their repr. Starting one takes a third of a second, an answer
    nothing beside it: each question is asked once, by one thread, and `alike` with it.

    Args:
        alike: others that are not supported, whose reasons will probably be asked for.
    """
    with _asking:
        if matmul not in _told:
            unknown = [matmul, *(other for other in dict.fromkeys(alike) if other != matmul and other not in _told)]
            _told.update(zip(unknown, _dispatched(unknown), strict=True))
        return _told[matmul]


def _dispatched(matmuls: Sequence[Matmul]) -> list[str]:
    """The reasons of each, from one process."""
    code = f"from xpuquant.kernels.onednn.api import *; create_aloud({matmuls!r})"
    environment = {**os.environ, "ONEDNN_VERBOSE": "dispatch"}
    said: list[str] = []
    with suppress(OSError, subprocess.TimeoutExpired):
        child = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, timeout=60
        )
        said = child.stdout.split(_NEXT)
    return [_reasons_in(text) for text in (*said, *[""] * len(matmuls))][: len(matmuls)]


_NEXT = "\nxpuquant: next matmul\n"


def create_aloud(matmuls: Iterable[Matmul]) -> None:
    """Have oneDNN say on standard output what it finds for each, with a line of ours behind it."""
    for matmul in matmuls:
        supported(matmul)
        ctypes.CDLL(None).fflush(None)
        os.write(1, _NEXT.encode())


def _reasons_in(said: str) -> str:
    # ...,<implementation>,...,<reason>,<file:line>: those that blame the processor, then the general ones.
    lines = [line.split(",") for line in said.splitlines() if "create:dispatch" in line]
    told = [line[-2] for line in lines if "isa" in line[-2]]
    told += [line[-2] for line in lines if "ref:any" in line and "sparse" not in line[-1]]
    return "; ".join(dict.fromkeys(told)) or "unimplemented"


class _OfThread(threading.local):
    """What each thread has for itself: a stream is filled by one at a time, and a primitive has one scratchpad, so that
    two executions of it at once would write over each other (oneDNN, "Primitive Attributes: scratchpad")."""

    def __init__(self) -> None:
        self.stream = _Owned(_new("stream_create", engine()[1], 1), "stream_destroy")
        self.primitive = lru_cache(maxsize=64)(_primitive)


@cache
def _threads() -> _OfThread:
    return _OfThread()


def _primitive(matmul: Matmul) -> _Owned:
    return _Owned(_new("primitive_create", _descriptor(matmul)), "primitive_destroy")


def implementation(matmul: Matmul) -> str:
    """The name of the implementation oneDNN chose, such as `brg_matmul:avx512_core_bf16`.

    Raises:
        UnsupportedError: none exists.
    """
    name = c_char_p()
    _call("primitive_desc_query", _descriptor(matmul), _IMPLEMENTATION, 0, byref(name))
    return (name.value or b"").decode()


class _Memory(_Owned):
    """A buffer of the engine, filled from and read back into numpy (which a GPU's memory needs)."""

    def __init__(self, shape: Shape, array: Array | None = None) -> None:
        described = _describe(shape)
        self.size: int = library().dnnl_memory_desc_get_size(described)
        super().__init__(_new("memory_create", described, engine()[1], _ALLOCATE), "memory_destroy")
        if array is not None:
            if array.nbytes != self.size:
                raise DamagedError(f"a tensor of {array.nbytes} bytes where the kernel reads {self.size}")
            contiguous = np.ascontiguousarray(array)
            self._mapped(lambda data: ctypes.memmove(data, contiguous.ctypes.data, self.size))

    def read(self, array: Array) -> None:
        """Copy the buffer into `array`, contiguous and of the same size."""
        self._mapped(lambda data: ctypes.memmove(array.ctypes.data, data, self.size))

    def _mapped(self, copy: Callable[[c_void_p], object]) -> None:
        data = c_void_p()
        _call("memory_map_data", self, byref(data))
        copy(data)
        _call("memory_unmap_data", self, data)


class _Argument(ctypes.Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


def run(matmul: Matmul, arguments: Mapping[int, tuple[Shape, Array]], out: Array) -> Array:
    """Execute over `arguments` (oneDNN argument → how it is described there, its bytes) into `out`, from any thread.

    Raises:
        UnsupportedError: oneDNN has no implementation for this engine; `reasons` says why.
        DamagedError: an argument's bytes are not as many as its description reads.
    """
    memories = {argument: _Memory(*value) for argument, value in arguments.items()}
    memories[DST] = _Memory(matmul.dst)
    passed = (_Argument * len(memories))(*(_Argument(arg, m._as_parameter_) for arg, m in memories.items()))
    mine = _threads()
    _call("primitive_execute", mine.primitive(matmul), mine.stream, len(memories), passed)
    _call("stream_wait", mine.stream)
    memories[DST].read(out)
    return out
