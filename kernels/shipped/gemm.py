"""The grouped GEMM of `libgrouped_gemm_xe_2`, made runnable on a CPU.

Its SPIR-V uses what only Intel's GPUs have. Replaced, and nothing else: blocks of inline vISA by functions of the same
meaning (`visa`), the address records of 2-D blocks, conversions to bfloat16, split barriers by whole ones (without them one
subgroup overwrites the number of the next tile before the others have read it), and prefetches by nothing.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from xpuquant.formats.scheme import Scheme
from xpuquant.kernels.shipped import spirv, visa
from xpuquant.kernels.shipped.device import aligned, cpu, placed
from xpuquant.kernels.shipped.spirv import Instruction
from xpuquant.kernels.shipped.wheel import Wheel

Array = np.ndarray[Any, Any]

_LIBRARY = "libgrouped_gemm_xe_2"
# SPV_INTEL_inline_assembly, SPV_INTEL_split_barrier, SPV_INTEL_bfloat16_conversion.
_ASM, _ASM_CALL, _ASM_TARGET = 5610, 5611, 5609
_ARRIVE, _WAIT, _BARRIER, _TO_BF16 = 6142, 6143, 224, 6116
_DROPPED_CAPABILITIES = (5606, 6141, 6115)
_DROPPED_EXTENSIONS = ("SPV_INTEL_inline_assembly", "SPV_INTEL_split_barrier", "SPV_INTEL_bfloat16_conversion")
_STORE, _LOAD, _BITCAST, _TO_GENERIC, _CALL = 62, 61, 124, 121, spirv.FUNCTION_CALL
_LINKAGE, _IMPORT = 41, 1
_FUNCTION_STORAGE, _GENERIC_STORAGE = 7, 8
_PAYLOADS = {
    "__builtin_IB_subgroup_createBlock2DAddressPayload": "shipped_payload",
    "__builtin_IB_subgroup_setBlock2DAddressPayloadBlockX": "shipped_payload_x",
    "__builtin_IB_subgroup_setBlock2DAddressPayloadBlockY": "shipped_payload_y",
}
_PAYLOAD_BYTES = 64


class _Rewriter:
    """One module on its way to a CPU. `module` and `source` are what comes out."""

    def __init__(self, module: spirv.Module) -> None:
        self._ids = itertools.count(module.header[3])
        self._head = [i for i in module.head() if not _dropped(i)]
        self._types = {i.words[0]: i for i in self._head if i.opcode in range(19, 40)}
        self._constants = {i.words[1]: i for i in self._head if i.opcode == spirv.CONSTANT}
        self._kinds: dict[int, int] = {}  # value → type
        for i in module.instructions:
            if i.result is not None and i.opcode not in range(19, 40) and len(i.words) > 1:
                self._kinds[i.result] = i.words[0]
        self._blocks = {i.words[1]: i for i in module.head() if i.opcode == _ASM}
        self._added: list[Instruction] = []  # types and constants
        self._imports: list[Instruction] = []
        self._decorations: list[Instruction] = []
        self._stand_ins: dict[tuple[Any, ...], int] = {}
        self.source = visa.PRELUDE
        self._byte = self._type(spirv.TYPE_INT, 8, 0)
        self._void = self._type(spirv.TYPE_VOID)
        self._private = self._type(spirv.TYPE_POINTER, _FUNCTION_STORAGE, self._byte)
        self._generic = self._type(spirv.TYPE_POINTER, _GENERIC_STORAGE, self._byte)
        self._create = self._rename_payloads()
        functions = [self._function(body) for body in module.functions().values()]
        header = (*module.header[:3], next(self._ids), module.header[4])
        first_type = next(n for n, i in enumerate(self._head) if i.opcode in range(19, 40))
        head = self._head[:first_type] + self._decorations + self._head[first_type:] + self._added + self._imports
        self.module = spirv.Module(header, head + [i for body in functions for i in body])

    def _type(self, opcode: int, *operands: int) -> int:
        """The id of a type, which a module may have once only."""
        for number, kind in self._types.items():
            if kind.opcode == opcode and kind.words[1:] == operands:
                return number
        number = next(self._ids)
        kind = Instruction(opcode, (number, *operands))
        self._types[number] = kind
        self._added.append(kind)
        return number

    def _constant(self, value: int) -> int:
        kind = self._type(spirv.TYPE_INT, 32, 0)
        for number, constant in self._constants.items():
            if constant.words[0] == kind and constant.words[2:] == (value,):
                return number
        number = next(self._ids)
        self._constants[number] = Instruction(spirv.CONSTANT, (kind, number, value))
        self._added.append(self._constants[number])
        return number

    def _rename_payloads(self) -> int | None:
        """The imports of address records get names that OpenCL C may define, and their maker a place as its first argument."""
        create = None
        for at, i in enumerate(self._head):
            if i.opcode == spirv.DECORATE and i.words[1] == _LINKAGE and i.text(2) in _PAYLOADS:
                self._head[at] = _linkage(i.words[0], _PAYLOADS[i.text(2)])
                if i.text(2).endswith("createBlock2DAddressPayload"):
                    create = i.words[0]
        return create

    def _import(self, name: str, result: int, parameters: list[int]) -> int:
        """Declare a function that is linked in."""
        kind = self._type(spirv.TYPE_FUNCTION, result, *parameters)
        number = next(self._ids)
        self._imports.append(Instruction(spirv.FUNCTION, (result, number, 0, kind)))
        self._imports += [Instruction(spirv.FUNCTION_PARAMETER, (p, next(self._ids))) for p in parameters]
        self._imports.append(Instruction(spirv.FUNCTION_END, ()))
        self._decorations.append(_linkage(number, name))
        return number

    def _function(self, body: list[Instruction]) -> list[Instruction]:
        if self._create is not None and body[0].words[1] == self._create:
            return self._with_place(body)
        self._variables: list[Instruction] = []
        out: list[Instruction] = []
        for i in body:
            if i.opcode == _ASM_CALL:
                out += self._asm(i)
            elif i.opcode == _TO_BF16:
                out += self._to_bf16(i)
            elif i.opcode == _CALL and i.words[2] == self._create:
                out += self._payload(i)
            elif i.opcode == _WAIT:
                out.append(Instruction(_BARRIER, i.words))
            elif i.opcode != _ARRIVE:
                out.append(i)
        label = next((n for n, i in enumerate(out) if i.opcode == spirv.LABEL), -1)
        return out[: label + 1] + self._variables + out[label + 1 :]

    def _with_place(self, body: list[Instruction]) -> list[Instruction]:
        function, *parameters, end = body
        kinds = [self._generic, *(p.words[0] for p in parameters)]
        kind = self._type(spirv.TYPE_FUNCTION, function.words[0], *kinds)
        place = Instruction(spirv.FUNCTION_PARAMETER, (self._generic, next(self._ids)))
        changed = Instruction(spirv.FUNCTION, (*function.words[:3], kind))
        return [changed, place, *parameters, end]

    def _variable(self, kind: int) -> tuple[int, list[Instruction]]:
        """A private variable of a type, and its address as a private byte pointer."""
        variable, pointer = next(self._ids), next(self._ids)
        self._variables.append(
            Instruction(spirv.VARIABLE, (self._type(spirv.TYPE_POINTER, _FUNCTION_STORAGE, kind), variable, 7))
        )
        return variable, [Instruction(_BITCAST, (self._private, pointer, variable))]

    def _payload(self, call: Instruction) -> list[Instruction]:
        array = self._type(spirv.TYPE_ARRAY, self._byte, self._constant(_PAYLOAD_BYTES))
        _, cast = self._variable(array)
        place = next(self._ids)
        generic = Instruction(_TO_GENERIC, (self._generic, place, cast[0].words[1]))
        return [*cast, generic, Instruction(_CALL, (*call.words[:3], place, *call.words[3:]))]

    def _to_bf16(self, conversion: Instruction) -> list[Instruction]:
        kind, result, value = conversion.words
        if self._types[kind].opcode != spirv.TYPE_INT:
            raise NotImplementedError("a conversion of vectors to bfloat16")
        name = "shipped_to_bf"
        if (name,) not in self._stand_ins:
            self._stand_ins[(name,)] = self._import(name, kind, [self._kinds[value]])
        return [Instruction(_CALL, (kind, result, self._stand_ins[(name,)], value))]

    def _asm(self, call: Instruction) -> list[Instruction]:
        """A block of vISA as a call: operands through private memory, the result out of it."""
        kind, result, block, *values = call.words
        text, constraints = _block(self._blocks[block])
        operands: list[visa.Operand | int | None] = []
        kinds: list[int | None] = []
        if constraints[0].startswith("="):
            operands.append(self._operand(kind))
            kinds.append(kind)
        tied = None
        for constraint, value in zip(constraints[len(operands) :], values, strict=True):
            if constraint == "P":
                operands.append(self._constants[value].words[2])
            elif constraint.isdecimal():
                tied = value
            elif self._kinds[value] == self._generic:
                operands.append(None)
            else:
                operands.append(self._operand(self._kinds[value], uniform=constraint.endswith(".u")))
        stand_in = self._stand_in(text, operands)
        if stand_in is None:
            return []
        before: list[Instruction] = []
        arguments, sources = [], iter(values)
        out = None
        for position, operand in enumerate(operands):
            value = None if constraints[0].startswith("=") and position == 0 else next(sources)
            if isinstance(operand, int):
                continue
            if operand is None:
                assert value is not None
                arguments.append(value)
                continue
            variable, cast = self._variable(kind if value is None else self._kinds[value])
            if value is None:
                out = variable
                value = tied
            if value is not None:
                before.append(Instruction(_STORE, (variable, value)))
            before += cast
            arguments.append(cast[0].words[1])
        before.append(Instruction(_CALL, (self._void, next(self._ids), stand_in, *arguments)))
        if out is not None:
            before.append(Instruction(_LOAD, (kind, result, out)))
        return before

    def _operand(self, kind: int, *, uniform: bool = False) -> visa.Operand:
        scalar = self._types[kind]
        elements = 1
        if scalar.opcode == spirv.TYPE_VECTOR:
            elements, scalar = scalar.words[2], self._types[scalar.words[1]]
        return visa.Operand(elements, scalar.words[1] // 8, uniform)

    def _stand_in(self, text: str, operands: list[visa.Operand | int | None]) -> int | None:
        key = (text, *operands)
        if key not in self._stand_ins:
            name = f"shipped_block_{len(self._stand_ins)}"
            source = visa.function(name, text, operands)
            if source is None:
                return None
            self.source += source
            kinds = [self._generic if o is None else self._private for o in operands if not isinstance(o, int)]
            self._stand_ins[key] = self._import(name, self._void, kinds)
        return self._stand_ins[key]


def _dropped(i: Instruction) -> bool:
    if i.opcode == spirv.CAPABILITY:
        return i.words[0] in _DROPPED_CAPABILITIES
    if i.opcode == spirv.EXTENSION:
        return i.text(0) in _DROPPED_EXTENSIONS
    return i.opcode in (_ASM, _ASM_TARGET)


def _block(i: Instruction) -> tuple[str, list[str]]:
    """Text and constraints of OpAsmINTEL."""
    text = i.text(4)
    return text, i.text(4 + len(text.encode()) // 4 + 1).split(",")


def _linkage(target: int, name: str) -> Instruction:
    raw = name.encode() + b"\0" * (4 - len(name) % 4)
    return Instruction(spirv.DECORATE, (target, _LINKAGE, *np.frombuffer(raw, np.uint32).tolist(), _IMPORT))


def portable(module: spirv.Module) -> tuple[spirv.Module, str]:
    """The module without what a CPU has not, and the OpenCL C source of the functions it calls instead."""
    rewriter = _Rewriter(module)
    return rewriter.module, rewriter.source


# The B_DTYPE of gemm_xe2.hpp by layout and granularity.
_KINDS = {("int4_experts", ""): 1, ("mxfp4_experts", ""): 2, ("mxfp8_experts", ""): 4}
_FP8_KINDS = {"tensor": 3, "block": 5}
_ACTIVATIONS = {"float16": "6half_t", "bfloat16": "10bfloat16_t"}
_FP8 = {"float8_e4m3fn": "12float_e4m3_t", "float8_e5m2": "12float_e5m2_t"}
_POSITION_OF_GROUP = 7


def grouped_gemm(
    wheel: Wheel, scheme: Scheme, x: Array, weight: Array, scale: Array, rows: Array, bias: Array | None = None
) -> Array:
    """`cutlass_grouped_gemm_interface` (xpu/grouped_gemm/xe_2/grouped_gemm_xe2_interface.hpp) on the bytes of a stack.

    Args:
        wheel: whose kernel.
        scheme: of the experts.
        x: float16 or bfloat16 `[M, K]`, the rows of expert 0 first.
        weight: as stored: uint8 `[E, N, K/2]`, or fp8 `[E, K, N]`.
        scale: as stored; for int4 in the dtype of x.
        rows: int32 `[E]`, how many rows each expert has.
        bias: `[E, N]` in the dtype of x.

    Returns:
        `[M, N]` in the dtype of x. KeyError where the wheel has no instance.
    """
    E, (M, K) = len(weight), x.shape
    packed = weight.dtype == np.uint8
    N = weight.shape[1] if packed else weight.shape[2]
    policy, items = _policy(packed, M // E)
    kind = _FP8_KINDS[scheme.granularity] if scheme.layout == "fp8_experts" else _KINDS[scheme.layout, ""]
    element = "tEh" if packed else _FP8[weight.dtype.name]
    parts = (_ACTIVATIONS[x.dtype.name], element, f"ENS_{len(policy)}{policy}E", f"B_DTYPEE{kind}E")
    name = wheel.named(_LIBRARY, *parts)
    group = scheme.group_size if kind != _FP8_KINDS["tensor"] else 0
    out, counter = aligned((M, N), x.dtype), aligned((1,), np.int32)
    pointers = [placed(x), placed(weight), placed(scale), None if bias is None else placed(bias), out]
    sizes = [np.int32(E), *([np.int32(group)] if group else []), np.int32(N), np.int32(K)]
    arguments = [*pointers, placed(rows.astype(np.int32)), *sizes, counter, cpu().local(4)]
    # One work group walks all tiles: with more, the first resets the counter that the others may have used by then.
    cpu().launch(_kernel(wheel, name, group), arguments, items, 1)
    return out


@functools.cache
def _kernel(wheel: Wheel, name: str, group: int) -> Any:
    module = wheel.module(_LIBRARY, name)
    if group:
        module = module.specialized(name, {_POSITION_OF_GROUP: group})
    module, source = portable(module)
    return cpu().kernel(module, name, source)


def _policy(packed: bool, average: int) -> tuple[str, int]:
    """The tile that the host chooses by the average number of rows, and its work items."""
    if packed:
        limits, last = (
            [(4, "w4a16_policy_m_8"), (8, "w4a16_policy_m_16"), (128, "w4a16_policy_m_32")],
            ("w4a16_policy", 512),
        )
    else:
        limits, last = [(8, "w8a16_policy_m_16"), (32, "w8a16_policy_m_32")], ("w8a16_policy", 128)
    return next(((name, 64) for limit, name in limits if average <= limit), last)
