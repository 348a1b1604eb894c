"""Reading and cutting SPIR-V and translating vISA, on modules and blocks made by hand: no wheel, no OpenCL needed."""

from __future__ import annotations

import numpy as np
import pytest

from xpuquant.kernels.shipped import spirv, visa
from xpuquant.kernels.shipped.spirv import Instruction, Module, Parameter


def text(value: str) -> tuple[int, ...]:
    raw = value.encode()
    return tuple(np.frombuffer(raw + b"\0" * (4 - len(raw) % 4), np.uint32).tolist())


def function(number: int, kind: int, parameters: dict[int, int], calls: int | None = None) -> list[Instruction]:
    """`parameters`: id → type."""
    body = [Instruction(spirv.FUNCTION, (1, number, 0, kind))]
    body += [Instruction(spirv.FUNCTION_PARAMETER, (kind, name)) for name, kind in parameters.items()]
    body.append(Instruction(spirv.LABEL, (number + 100,)))
    if calls is not None:
        body.append(Instruction(spirv.FUNCTION_CALL, (1, number + 200, calls)))
    return [*body, Instruction(253, ()), Instruction(spirv.FUNCTION_END, ())]


@pytest.fixture
def module() -> Module:
    """Kernels `first(global int *, int)`, which calls a function, and `second()`."""
    head = [
        Instruction(spirv.CAPABILITY, (6,)),
        Instruction(spirv.MEMORY_MODEL, (2, 2)),
        Instruction(spirv.ENTRY_POINT, (6, 10, *text("first"))),
        Instruction(spirv.ENTRY_POINT, (6, 11, *text("second"))),
        Instruction(spirv.EXECUTION_MODE, (10, 31)),
        Instruction(spirv.EXECUTION_MODE, (11, 31)),
        Instruction(spirv.NAME, (10, *text("first"))),
        Instruction(spirv.NAME, (11, *text("second"))),
        Instruction(spirv.TYPE_VOID, (1,)),
        Instruction(spirv.TYPE_INT, (2, 32, 0)),
        Instruction(spirv.TYPE_POINTER, (3, 5, 2)),
        Instruction(spirv.TYPE_FUNCTION, (4, 1, 3, 2)),
        Instruction(spirv.TYPE_FUNCTION, (5, 1)),
    ]
    bodies = [*function(10, 4, {20: 3, 21: 2}, calls=12), *function(11, 5, {}), *function(12, 5, {})]
    return Module((0x07230203, 0x10400, 0, 400, 0), head + bodies)


def test_a_module_is_found_among_other_bytes(module: Module) -> None:
    data = module.write()
    file = b"ELF!" + b"\x03\x02\x23\x07" + bytes(20) + data + bytes(8) + data + b"tail"
    assert [file[start:stop] for start, stop in spirv.find(file)] == [data, data]
    assert spirv.entry_names(data) == ["first", "second"]
    assert Module.read(data) == module


def test_one_kernel_keeps_what_it_calls_and_nothing_else(module: Module) -> None:
    first, second = module.only("first"), module.only("second")
    assert set(first.functions()) == {10, 12} and set(second.functions()) == {11}
    assert list(first.entries()) == ["first"]
    assert {i.words[0] for i in second.instructions if i.opcode in (spirv.NAME, spirv.EXECUTION_MODE)} == {11}
    with pytest.raises(KeyError):
        module.only("third")


def test_parameters_are_told_by_storage_and_size(module: Module) -> None:
    assert module.parameters("first") == [Parameter("global", 8), Parameter("value", 4)]


def test_a_parameter_becomes_a_constant(module: Module) -> None:
    changed = module.specialized("first", {1: 32})
    (constant,) = (i for i in changed.instructions if i.opcode == spirv.CONSTANT)
    assert constant.words == (2, 400, 32) and changed.header[3] == 401
    assert Module.read(changed.write()) == changed


@pytest.mark.parametrize("data", [b"", b"\x03\x02\x23\x07" + bytes(16) + b"\x11\x00\x00\x00", b"x" * 24])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="no SPIR-V module"):
        Module.read(data)


def test_a_block_of_visa_becomes_c() -> None:
    block = """{
.decl IN_UB v_type=G type=UB num_elts=64 alias=<$1,0>
.decl OUT_UW v_type=G type=UW num_elts=64 alias=<$0,0>
shr (M1_NM, 32) OUT_UW(1,0)<1> IN_UB(0,2)<4;2,0> 4:uw
bfn.x6A (M1_NM, 32) OUT_UW(0,0)<1> 0x8:uw OUT_UW(0,0)<1;1,0> 0xF:uw
}"""
    source = visa.function("f", block, [visa.Operand(4, 2, read=False), visa.Operand(4, 1)])
    assert source is not None
    assert "OUT_UW[32 + e * 1] = (u16)(IN_UB[2 + e / 2 * 4 + e % 2 * 0] >> 4u)" in source
    assert "collect(f1, v1, 4, 1)" in source and "collect(f0" not in source


def test_the_truth_table_of_three_sources() -> None:
    expression = visa._boolean(0x6A, ["a", "b", "c"])
    for a in (0, 1):
        for b in (0, 1):
            for c in (0, 1):
                assert eval(expression, {"a": a, "b": b, "c": c}) & 1 == a ^ (b & c)


@pytest.mark.parametrize("line", ["sqrt (M1_NM, 32) A(0,0)<1> A(0,0)<1;1,0>", "goto somewhere"])
def test_an_instruction_without_a_translation_is_named(line: str) -> None:
    block = f".decl A v_type=G type=F num_elts=32 alias=<$0,0>\n{line}"
    with pytest.raises(NotImplementedError, match=line.split()[0]):
        visa.function("f", block, [visa.Operand(2, 4)])


def test_a_prefetch_becomes_nothing() -> None:
    assert visa.function("f", "lsc_load_block2d.ugm.ca.ca (M1, 1)  %null:d16.2x8nn flat[$0+(0,0)]", [None]) is None
