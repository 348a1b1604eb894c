"""The grouped GEMM of `libgrouped_gemm_xe_2`, made runnable on a CPU.

Its SPIR-V uses what only Intel's GPUs have. Replaced, and nothing else: blocks of inline vISA by functions of the same
meaning (`visa`); the address records of 2-D blocks; conversions to bfloat16; split barriers by whole ones (without any,
one subgroup overwrites the number of the next tile before the others have read it); prefetches by nothing.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from xpuquant.kernels.shipped import spirv, visa
from xpuquant.kernels.shipped.spirv import Instruction

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
        """Give the imports of address records names that OpenCL C may define; the id of the one that makes them."""
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

    def _variable(self, kind: int) -> tuple[int, int, Instruction]:
        """A private variable of a type; its id, that of a private byte pointer to it, and the cast that makes it."""
        variable, pointer = next(self._ids), next(self._ids)
        storage = self._type(spirv.TYPE_POINTER, _FUNCTION_STORAGE, kind)
        self._variables.append(Instruction(spirv.VARIABLE, (storage, variable, _FUNCTION_STORAGE)))
        return variable, pointer, Instruction(_BITCAST, (self._private, pointer, variable))

    def _payload(self, call: Instruction) -> list[Instruction]:
        array = self._type(spirv.TYPE_ARRAY, self._byte, self._constant(_PAYLOAD_BYTES))
        _, pointer, cast = self._variable(array)
        place = next(self._ids)
        generic = Instruction(_TO_GENERIC, (self._generic, place, pointer))
        return [cast, generic, Instruction(_CALL, (*call.words[:3], place, *call.words[3:]))]

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
        returns = constraints[0].startswith("=")
        given = list(zip(constraints[returns:], values, strict=True))
        tied = next((value for constraint, value in given if constraint == "0"), None)  # the result's first value
        sources = [(constraint, value) for constraint, value in given if constraint != "0"]
        operands = [self._source(constraint, value) for constraint, value in sources]
        if returns:
            operands.insert(0, self._operand(kind, read=tied is not None))
        stand_in = self._stand_in(text, operands)
        if stand_in is None:
            return []
        code, arguments = [], []
        if returns:
            variable, pointer, cast = self._variable(kind)
            code = [cast] if tied is None else [Instruction(_STORE, (variable, tied)), cast]
            arguments.append(pointer)
        for operand, (_, value) in zip(operands[returns:], sources, strict=True):
            if operand is None:
                arguments.append(value)
            elif isinstance(operand, visa.Operand):
                place, pointer, cast = self._variable(self._kinds[value])
                code += [Instruction(_STORE, (place, value)), cast]
                arguments.append(pointer)
        code.append(Instruction(_CALL, (self._void, next(self._ids), stand_in, *arguments)))
        if returns:
            code.append(Instruction(_LOAD, (kind, result, variable)))
        return code

    def _source(self, constraint: str, value: int) -> visa.Operand | int | None:
        if constraint == "P":
            return self._constants[value].words[2]
        if self._kinds[value] == self._generic:
            return None
        return self._operand(self._kinds[value], uniform=constraint.endswith(".u"))

    def _operand(self, kind: int, *, uniform: bool = False, read: bool = True) -> visa.Operand:
        scalar = self._types[kind]
        elements = 1
        if scalar.opcode == spirv.TYPE_VECTOR:
            elements, scalar = scalar.words[2], self._types[scalar.words[1]]
        return visa.Operand(elements, scalar.words[1] // 8, uniform, read)

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


def make_portable(module: spirv.Module) -> tuple[spirv.Module, str]:
    """The module without what a CPU has not, and the OpenCL C source of the functions it calls instead."""
    rewriter = _Rewriter(module)
    return rewriter.module, rewriter.source


# Functions of DPC++'s device library that a GPU's compiler brings.
_DEVICELIB = {
    "__devicelib_ConvertBF16ToFINTEL": "float __devicelib_ConvertBF16ToFINTEL(ushort *x) { return from_bf(*x); }",
    "__devicelib_ConvertFToBF16INTEL": "ushort __devicelib_ConvertFToBF16INTEL(float *x) { return to_bf(*x); }",
}


def imported(module: spirv.Module) -> str:
    """The OpenCL C source of the library functions that a module imports; empty where it imports none."""
    names = {i.text(2) for i in module.head() if i.opcode == spirv.DECORATE and i.words[1] == _LINKAGE}
    bodies = [body for name, body in _DEVICELIB.items() if name in names]
    return "\n".join([visa.BFLOAT16, *bodies, ""]) if bodies else ""
