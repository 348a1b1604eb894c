"""SPIR-V modules as lists of instructions: found in a file, read, cut down to one kernel, written.

Source of every number here: the SPIR-V specification 1.6 and the registry of the SPV_INTEL and SPV_KHR extensions
named beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MAGIC = 0x07230203
_HEADER = 5  # words: magic, version, generator, bound, schema

# Opcodes by their names in the specification, as far as they are spoken of here.
NAME, MEMBER_NAME, EXTENSION = 5, 6, 10
EXT_INST_IMPORT, MEMORY_MODEL, ENTRY_POINT, EXECUTION_MODE, CAPABILITY = 11, 14, 15, 16, 17
TYPE_VOID, TYPE_BOOL, TYPE_INT, TYPE_FLOAT, TYPE_VECTOR, TYPE_ARRAY, TYPE_STRUCT = 19, 20, 21, 22, 23, 28, 30
TYPE_POINTER, TYPE_FUNCTION = 32, 33
CONSTANT, VARIABLE = 43, 59
FUNCTION, FUNCTION_PARAMETER, FUNCTION_END, FUNCTION_CALL = 54, 55, 56, 57
DECORATE, MEMBER_DECORATE, DECORATE_ID, LABEL = 71, 72, 332, 248
CONSTANT_FUNCTION_POINTER = 5600  # SPV_INTEL_function_pointers

# Instructions of a function body without a result.
_NO_RESULT = frozenset(
    [
        *(0, 8, 56, 62, 63, 64, 224, 225, 228, 246, 247, 249, 250, 251, 252, 253, 254, 255, 256, 257, 260, 317, 319),
        *(5576, 5578, 5630, 6142, 6143),  # subgroup block writes, assume, split barriers
    ]
)
# Results that have no type before them: labels, types, imports, strings, alias scopes.
_UNTYPED_RESULT = frozenset([7, 11, 73, LABEL, *range(19, 40), 5911, 5912, 5913, 5609])
# Storage classes of kernel parameters.
_STORAGE = {4: "local", 5: "global", 7: "value", 8: "generic"}


class Instruction(NamedTuple):
    """One instruction; `words` are its operands, without the first word of opcode and length."""

    opcode: int
    words: tuple[int, ...]

    @property
    def result(self) -> int | None:
        """The id that a typed instruction, a label or a type defines."""
        if self.opcode in _UNTYPED_RESULT:
            return self.words[0]
        return None if self.opcode in _NO_RESULT or len(self.words) < 2 else self.words[1]

    def text(self, at: int) -> str:
        """The string operand that begins at word `at`."""
        return np.array(self.words[at:], np.uint32).tobytes().split(b"\0")[0].decode()


class Parameter(NamedTuple):
    """One parameter of a kernel: "global", "local" or "generic" pointer, or "value" (of `size` bytes, or a struct)."""

    kind: str
    size: int


@dataclasses.dataclass
class Module:
    """A SPIR-V module: header words, then instructions in order."""

    header: tuple[int, ...]
    instructions: list[Instruction]

    @classmethod
    def read(cls, data: bytes) -> Module:
        """Raise ValueError where `data` is no module from its first word to its last."""
        words = np.frombuffer(data, np.uint32)
        if len(words) < _HEADER or words[0] != _MAGIC:
            raise ValueError("no SPIR-V module: the magic word is missing")
        values, position, instructions = words.tolist(), _HEADER, []
        while position < len(values):
            length = values[position] >> 16
            if not length or position + length > len(values):
                raise ValueError(f"no SPIR-V module: word {position} is no instruction")
            operands = tuple(values[position + 1 : position + length])
            instructions.append(Instruction(values[position] & 0xFFFF, operands))
            position += length
        return cls(tuple(values[:_HEADER]), instructions)

    def write(self) -> bytes:
        """The module's bytes."""
        words = list(self.header)
        for opcode, operands in self.instructions:
            words.append(len(operands) + 1 << 16 | opcode)
            words.extend(operands)
        return np.array(words, np.uint32).tobytes()

    def entries(self) -> dict[str, int]:
        """Name → id of every kernel."""
        return {i.text(2): i.words[1] for i in self.instructions if i.opcode == ENTRY_POINT}

    def functions(self) -> dict[int, list[Instruction]]:
        """Id → instructions of every function, from OpFunction to OpFunctionEnd."""
        found: dict[int, list[Instruction]] = {}
        current: list[Instruction] = []
        for instruction in self.instructions:
            if instruction.opcode == FUNCTION:
                current = found.setdefault(instruction.words[1], [])
            if current is not None:
                current.append(instruction)
            if instruction.opcode == FUNCTION_END:
                current = []
        return found

    def head(self) -> list[Instruction]:
        """Everything before the first function."""
        opcodes = [i.opcode for i in self.instructions]
        return self.instructions[: opcodes.index(FUNCTION)] if FUNCTION in opcodes else self.instructions

    def parameters(self, name: str) -> list[Parameter]:
        """The parameters of a kernel, in order. DPC++ has dropped those that its kernel never reads."""
        types = {i.words[0]: i for i in self.instructions if i.opcode in range(19, 40)}
        values = {i.words[1]: i.words[2] for i in self.instructions if i.opcode == CONSTANT}
        body = self.functions()[self.entries()[name]]
        kinds = [types[i.words[0]] for i in body if i.opcode == FUNCTION_PARAMETER]
        return [_parameter(kind, types, values) for kind in kinds]

    def only(self, name: str) -> Module:
        """The module with one kernel and what it calls. Compiling is much faster then. Raise KeyError without it."""
        functions, head, wanted = self.functions(), self.head(), self.entries()[name]
        keep: set[int] = set()
        pending = [wanted]
        pending += [i.words[2] for i in head if i.opcode == CONSTANT_FUNCTION_POINTER]
        while pending:
            if (function := pending.pop()) in keep:
                continue
            keep.add(function)
            pending += [i.words[2] for i in functions[function] if i.opcode == FUNCTION_CALL]
        gone = {i.result for f, body in functions.items() if f not in keep for i in body if i.result is not None}
        kept = [i for i in head if not _speaks_of(i, gone) and not (i.opcode == ENTRY_POINT and i.words[1] != wanted)]
        kept = [i for i in kept if not (i.opcode == EXECUTION_MODE and i.words[0] != wanted)]
        for function, body in functions.items():
            if function in keep:
                kept += body
        return Module(self.header, kept)

    def specialized(self, name: str, values: dict[int, int]) -> Module:
        """The module with some 32-bit parameters of a kernel (by position) replaced by constants.

        The parameters stay, so that calls need not change; their values no longer matter, and code for other values is
        removed when the module is built.
        """
        function = self.entries()[name]
        parameters = [i for i in self.functions()[function] if i.opcode == FUNCTION_PARAMETER]
        fresh = iter(range(self.header[3], self.header[3] + len(values)))
        known = {parameters[at].words[1]: (next(fresh), parameters[at].words[0], value) for at, value in values.items()}
        constants = [Instruction(CONSTANT, (kind, number, value)) for number, kind, value in known.values()]
        head = self.head()
        body = [
            i
            if i.opcode == FUNCTION_PARAMETER
            else Instruction(i.opcode, tuple(known[word][0] if word in known else word for word in i.words))
            for i in self.functions()[function]
        ]
        rest = [i for f, other in self.functions().items() if f != function for i in other]
        header = (*self.header[:3], self.header[3] + len(values), self.header[4])
        return Module(header, [*head, *constants, *rest, *body])


def _speaks_of(instruction: Instruction, gone: set[int]) -> bool:
    """Whether a name or decoration is about an id that is no longer there."""
    about = (NAME, MEMBER_NAME, DECORATE, MEMBER_DECORATE, DECORATE_ID, EXECUTION_MODE)
    return instruction.opcode in about and instruction.words[0] in gone


def _parameter(kind: Instruction, types: dict[int, Instruction], values: dict[int, int]) -> Parameter:
    if kind.opcode == TYPE_POINTER:
        storage = _STORAGE[kind.words[1]]
        return Parameter(storage, _size(types[kind.words[2]], types, values) if storage == "value" else 8)
    return Parameter("value", _size(kind, types, values))


def _size(kind: Instruction, types: dict[int, Instruction], values: dict[int, int]) -> int:
    """Bytes of a type, padded as C pads it."""
    return _layout(kind, types, values)[0]


def _layout(kind: Instruction, types: dict[int, Instruction], values: dict[int, int]) -> tuple[int, int]:
    """Size and alignment."""
    if kind.opcode == TYPE_BOOL:
        return 1, 1
    if kind.opcode in (TYPE_INT, TYPE_FLOAT):
        return kind.words[1] // 8, kind.words[1] // 8
    if kind.opcode == TYPE_POINTER:
        return 8, 8
    if kind.opcode == TYPE_VECTOR:
        size = _layout(types[kind.words[1]], types, values)[0] * (4 if kind.words[2] == 3 else kind.words[2])
        return size, size
    if kind.opcode == TYPE_ARRAY:
        size, align = _layout(types[kind.words[1]], types, values)
        return size * values[kind.words[2]], align
    if kind.opcode == TYPE_STRUCT:
        offset, widest = 0, 1
        for member in kind.words[1:]:
            size, align = _layout(types[member], types, values)
            offset = -(-offset // align) * align + size
            widest = max(widest, align)
        return -(-offset // widest) * widest, widest
    return 0, 1


def entry_names(data: bytes) -> list[str]:
    """The kernels of a module, from its first words alone."""
    words, position, names = np.frombuffer(data, np.uint32), _HEADER, []
    while position < len(words):
        opcode, length = int(words[position]) & 0xFFFF, int(words[position]) >> 16
        if opcode not in (CAPABILITY, EXTENSION, EXT_INST_IMPORT, MEMORY_MODEL, ENTRY_POINT):
            break
        if opcode == ENTRY_POINT:
            names.append(words[position + 3 : position + length].tobytes().split(b"\0")[0].decode())
        position += length
    return names


def find(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, stop) of every module inside a file.

    A module begins with the magic word, version 1.x, schema 0 and a capability. It ends after the OpFunctionEnd that
    no OpFunction follows.
    """
    magic, start = _MAGIC.to_bytes(4, "little"), 0
    while (start := data.find(magic, start)) >= 0:
        stop = _end(data, start)
        if stop:
            yield start, stop
        start = stop or start + 4


def _end(data: bytes, start: int) -> int:
    """Where the module that begins at `start` ends; 0 where none begins there."""
    words = np.frombuffer(data, np.uint32, (len(data) - start) // 4, start)
    if len(words) < 8 or words[1] & 0xFF0000FF or words[1] >> 16 != 1 or words[4] or words[5] != 2 << 16 | CAPABILITY:
        return 0
    position = _HEADER
    while position < len(words):
        length, opcode = int(words[position]) >> 16, int(words[position]) & 0xFFFF
        if not length:
            return 0
        position += length
        if opcode == FUNCTION_END and (position >= len(words) or int(words[position]) != 5 << 16 | FUNCTION):
            return start + 4 * position
    return 0
