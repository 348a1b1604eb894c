"""The machine code of loops: compiled by numba once on a machine, kept, and loaded by llvmlite ever after.

numba keeps machine code too, but its import, and what it sets up to load a function, take half a second of every
process. What is kept here is the object file of one loop for some types, behind the digest of all that went into it:
the loop's text, the processor, the versions of the tools. It lies beside the bytecode of the loop's module, or in the
user's cache folder where that cannot be written. The first conversion of a format on a machine takes some seconds
longer.
"""

from __future__ import annotations

import contextlib
import functools
import os
from hashlib import sha256
from importlib.util import cache_from_source
from pathlib import Path
from types import FunctionType
from typing import Any, cast

import llvmlite
from llvmlite import binding

from xpuquant.formats.packing.jit import ArrayType, Key, Loop, Numbers, is_array

_SYMBOL = "loop"
_DIGEST = 32
_ENGINES: list[Any] = []
"""Machine code lives as long as its engine: as long as the process."""


def address_of(function: FunctionType, key: Key) -> int:
    """The address of a loop's machine code for these types."""
    kept = Kept(function, key)
    code = kept.read()
    if code is None:
        code = object_code(function, key)
        kept.write(code)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _target_machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _ENGINES.append(engine)
    return int(engine.get_function_address(_SYMBOL))


def object_code(function: FunctionType, key: Key) -> bytes:
    """An object file with one symbol, the loop."""
    import numba

    dispatcher = _dispatcher(function)
    dispatcher.compile(tuple(_numba_type(one) for one in key))
    (signature,) = dispatcher.signatures
    made = dispatcher.overloads[signature]
    if made.signature.return_type not in (numba.types.int64, numba.types.boolean, numba.types.none):
        raise AssertionError(f"{function.__name__} gives {made.signature.return_type}")
    module = binding.parse_assembly(dispatcher.inspect_llvm(signature))
    for other in module.functions:
        if other.is_declaration and not other.name.startswith("llvm."):
            raise AssertionError(f"{function.__name__} calls {other.name}: loops call nothing")
    loop = module.get_function(made.fndesc.llvm_func_name)
    taken = ["pointer" if str(one.type).endswith(("*", "ptr")) else str(one.type) for one in loop.arguments]
    if taken != _passed(key):
        raise AssertionError(f"numba {numba.__version__} passes arguments in a new way, {taken}: install an older one")
    loop.name = _SYMBOL
    return bytes(_target_machine().emit_object(module))


def _passed(key: Key) -> list[str]:
    """What LLVM calls that which `Loop` passes."""
    passed = ["pointer", "pointer"]
    for one in key:
        if is_array(one):
            passed += ["pointer", "pointer", "i64", "i64", "pointer", *["i64"] * (2 * one[1])]
        else:
            passed += [f"i{8 * number.itemsize}" for number in cast("Numbers", one)]
    return passed


def _dispatcher(function: FunctionType) -> Any:
    """numba's object of a loop, without what would call it from Python; so too of the loops that it calls."""
    import numba

    called = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    inner = {name: _dispatcher(other.function) for name, other in called.items() if isinstance(other, Loop)}
    own = FunctionType(function.__code__, {**function.__globals__, **inner}, function.__name__)
    options: dict[str, Any] = {"_nrt": False, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(error_model="numpy", **options)(own)


def _numba_type(one: Numbers | ArrayType) -> Any:
    import numba

    types: Any = numba.types
    element = numba.from_dtype(one[0])  # none of another byte order
    if is_array(one):
        _, axes, contiguous, aligned = one
        return types.Array(element, axes, "C" if contiguous else "A", aligned=aligned)
    return element if len(one) == 1 else types.UniTuple(element, len(one))


def _target_machine() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = _processor()
    return binding.Target.from_default_triple().create_target_machine(name, features, opt=3, jit=True)


def _processor() -> tuple[str, str]:
    """LLVM's name of the processor, and its features: numba's, whose variables cap both (`scripts/lanes/isa`)."""
    name = os.environ.get("NUMBA_CPU_NAME") or str(binding.get_host_cpu_name())
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        features = "" if name == "generic" else str(binding.get_host_cpu_features().flatten())
    return name, features


class Kept:
    """The object file of a loop for some types, as this machine keeps it."""

    def __init__(self, function: FunctionType, key: Key) -> None:
        source = function.__code__.co_filename
        texts = [_text(file) for file in (source, __file__)]
        tools = llvmlite.__version__, binding.llvm_version_info, _processor()
        self._made_of = repr((function.__qualname__, key, tools, texts)).encode()
        name = f"{Path(source).stem}.{function.__name__.strip('<>')}-{sha256(self._made_of).hexdigest()[:24]}.o"
        self._files = [folder / name for folder in _folders(source)] if None not in texts else []

    def read(self) -> bytes | None:
        """None where it isn't kept, or not as it was written."""
        for file in self._files:
            try:
                kept = file.read_bytes()
            except OSError:
                continue
            code = kept[_DIGEST:]
            if kept[:_DIGEST] == self._digest(code):
                return code
        return None

    def write(self, code: bytes) -> None:
        """Into the first folder that takes it. Where none does, each process compiles for itself."""
        for file in self._files:
            unfinished = file.with_name(f"{file.name}.{os.getpid()}")
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(self._digest(code) + code)
                unfinished.replace(file)
            except OSError:
                continue
            return

    def _digest(self, code: bytes) -> bytes:
        return sha256(self._made_of + code).digest()


@functools.cache
def _text(source: str) -> bytes | None:
    """Of a module's file, which changes when a loop does; None for a module that isn't a file."""
    try:
        return Path(source).read_bytes()
    except OSError:
        return None


def _folders(source: str) -> list[Path]:
    folders = [Path(cache_from_source(source)).parent]
    with contextlib.suppress(RuntimeError):  # where nobody is at home
        folders.append(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "xpuquant")
    return [folder for folder in folders if folder.is_absolute()]
