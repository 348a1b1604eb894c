"""Inline vISA of the shipped kernels as OpenCL C that a CPU compiles.

The grouped GEMM has its loads, stores, matrix products and number conversions in blocks of vISA, the assembly of
Intel's GPUs. Each becomes a function of the same meaning, translated instruction by instruction: nothing here knows
what a nibble or a scale is.

Registers: a variable with n elements of S bytes per lane lies element by element, 16 lanes side by side: element i of
lane l is byte (16·i + l)·S. A function collects its operands from all lanes into that order, runs the block on them,
and keeps the bytes of its own lane. A register is 64 bytes (Xe2). An operand `V(r,c)<v;w,h>` begins at element c of
register r; element e of an instruction is (e / w)·v + (e % w)·h further on.

Source: the vISA documentation of intel-graphics-compiler (documentation/visa).
"""

from __future__ import annotations

import dataclasses
import re

LANES = 16
_REGISTER = 64
_C_TYPES = {"UB": "u8", "UW": "u16", "W": "s16", "UD": "u32", "HF": "u16", "BF": "u16", "F": "f32"}
_SIZES = {"UB": 1, "UW": 2, "W": 2, "UD": 4, "HF": 2, "BF": 2, "F": 4}

BFLOAT16 = """
float from_bf(ushort bits) { return as_float((uint)bits << 16); }
ushort to_bf(float value)
{
    uint bits = as_uint(value);
    if (isnan(value)) return (ushort)(bits >> 16 | 64);
    return (ushort)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
"""

PRELUDE = (
    BFLOAT16
    + """
#pragma OPENCL EXTENSION cl_intel_subgroups : enable
/* One register is read as several types. */
typedef uchar __attribute__((may_alias)) u8;
typedef ushort __attribute__((may_alias)) u16;
typedef short __attribute__((may_alias)) s16;
typedef uint __attribute__((may_alias)) u32;
typedef float __attribute__((may_alias)) f32;
typedef struct { ulong base; uint width, height, pitch; int x, y; } payload;

/* Address records of 2-D blocks: sizes are given less one; the record lies where the caller says. */
uchar *shipped_payload(
    uchar *p, ulong base, uint width, uint height, uint pitch, uint x, uint y, uint w, uint h, uint n)
{
    payload *q = (payload *)p;
    q->base = base; q->width = width + 1; q->height = height + 1; q->pitch = pitch + 1; q->x = (int)x; q->y = (int)y;
    return p;
}
void shipped_payload_x(uchar *p, uint x) { ((payload *)p)->x = (int)x; }
void shipped_payload_y(uchar *p, uint y) { ((payload *)p)->y = (int)y; }

/* The bytes of all lanes of a variable with n elements of S bytes, in the order of registers. */
__attribute__((noinline)) void collect(private uchar *flat, private const uchar *own, int n, int S)
{
    for (int i = 0; i < n; ++i) {
        uint value = S == 1 ? own[i] : S == 2 ? ((private const u16 *)own)[i] : ((private const u32 *)own)[i];
        for (int l = 0; l < 16; ++l) {
            uint other = intel_sub_group_shuffle(value, (uint)l);
            int j = i * 16 + l;
            if (S == 1) flat[j] = (uchar)other;
            else if (S == 2) ((private u16 *)flat)[j] = (ushort)other;
            else ((private u32 *)flat)[j] = other;
        }
    }
}
/* The bytes of this lane of such a variable. */
__attribute__((noinline)) void keep(private uchar *own, private const uchar *flat, int n, int S)
{
    int l = (int)get_sub_group_local_id();
    for (int i = 0; i < n; ++i)
        for (int b = 0; b < S; ++b) own[i * S + b] = flat[(i * 16 + l) * S + b];
}
float from_hf(ushort bits) { return vload_half(0, (private const half *)&bits); }
ushort to_hf(float value) { ushort bits; vstore_half_rte(value, 0, (private half *)&bits); return bits; }
ushort shipped_to_bf(float value) { return to_bf(value); }
"""
)


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of a block.

    Attributes:
        elements: per lane.
        size: bytes of one.
        uniform: the same in all lanes.
        read: False for a result without a first value.
    """

    elements: int
    size: int
    uniform: bool = False
    read: bool = True

    @property
    def bytes(self) -> int:
        """Of one lane."""
        return self.elements * self.size


def function(name: str, text: str, operands: list[Operand | int | None]) -> str | None:
    """The OpenCL C function that stands for a block; None for a prefetch.

    Args:
        name: of the function.
        text: the vISA, operands as `$0`, `$1`, …
        operands: of `$0` and on: a variable, a constant, or None for an address record. The function takes a private
            pointer for each variable and a generic pointer for an address record, in this order.

    Raises:
        NotImplementedError: with the instruction that has no translation.
    """
    if "%null" in text:
        return None
    for index, operand in reversed(list(enumerate(operands))):
        if isinstance(operand, int):
            text = text.replace(f"${index}", str(operand))
    kinds = [
        "uchar *" if operand is None else "private uchar *" for operand in operands if not isinstance(operand, int)
    ]
    names = [f"v{index}" for index, operand in enumerate(operands) if not isinstance(operand, int)]
    header = (
        f"__attribute__((noinline)) void {name}({', '.join(kind + n for kind, n in zip(kinds, names, strict=True))})"
    )
    if "block2d" in text:
        body = _block2d(text, operands)
    elif "dpas" in text:
        body = _dpas(text, operands)
    else:
        body = _arithmetic(text, operands)
    return f"{header}\n{{\n{body}\n}}\n"


def _block2d(text: str, operands: list[Operand | int | None]) -> str:
    """A load or store of one or more blocks; what lies outside of the surface reads as zero and is not written.

    In registers a block's rows follow each other, their length rounded up to a power of two; transposed, its columns
    do. Transformed, each group of rows that fills 4 bytes is interleaved column by column. A block begins at a
    register.
    """
    shape = re.search(r":d(\d+)\.(?:(\d+)x)?(\d+)x(\d+)([nt])([nt])", text)
    address = re.search(r"flat\[\$(\d)\+\(0,0\)\]", text)
    data = re.search(r"\$(\d):d", text)
    if shape is None or address is None or data is None:
        raise NotImplementedError(text)
    bits, blocks, width, height = (int(group or 1) for group in shape.groups()[:4])
    transposed, transformed = shape[5] == "t", shape[6] == "t"
    size, own = bits // 8, operands[int(data[1])]
    assert isinstance(own, Operand)
    rows = _power(height) if transposed else height
    columns = width if transposed else _power(width)
    pack = 4 // size if transformed else 1
    stride = -(-rows * columns * size // _REGISTER) * _REGISTER
    if transposed:
        place = f"int c = e / {rows}, r = e % {rows};"
    else:
        place = f"int g = e / {columns * pack}, c = e / {pack} % {columns}, r = g * {pack} + e % {pack};"
    store = "store" in text
    at = f"v{data[1]}[i * {own.size} + b]"
    memory = "((global uchar *)(p.base))[(long)y * p.pitch + (long)x * " + f"{size} + z]"
    action = f"if (inside) {memory} = {at};" if store else f"{at} = inside ? {memory} : 0;"
    return f"""    payload p = *(payload *)v{address[1]};
    int l = (int)get_sub_group_local_id();
    for (int i = 0; i < {own.elements}; ++i)
        for (int b = 0; b < {own.size}; ++b) {{
            int flat = (i * 16 + l) * {own.size} + b;
            int block = flat / {stride}, e = flat % {stride} / {size}, z = flat % {size};
            {place}
            int x = p.x + block * {width} + c, y = p.y + r;
            int inside = block < {blocks} && c < {width} && r < {height} && x >= 0 && y >= 0 &&
                         (uint)(x * {size} + {size - 1}) < p.width && (uint)y < p.height;
            {action}
        }}"""


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _dpas(text: str, operands: list[Operand | int | None]) -> str:
    """D += A·B: D float `[rows, 16]`, A `[rows, 16]` row by row, B `[16, 16]` with pairs of rows in a dword.

    Products of 16-bit floats are exact in float32; they are added one after the other. In which order the hardware
    adds them within one instruction, and how it rounds between, is not known here.
    """
    match = re.search(r"dpas\.(\w+)\.(\w+)\.8\.(\d+)", text)
    if match is None or match[1] != match[2] or match[1] not in ("hf", "bf"):
        raise NotImplementedError(text)
    rows, convert = int(match[3]), f"from_{match[1]}"
    first, second = operands[1], operands[2]
    assert isinstance(first, Operand) and isinstance(second, Operand)
    return f"""    private f32 *d = (private f32 *)v0;
    uchar f1[{first.bytes * LANES}] __attribute__((aligned(64)));
    uchar f2[{second.bytes * LANES}] __attribute__((aligned(64)));
    collect(f1, v1, {first.elements}, {first.size});
    collect(f2, v2, {second.elements}, {second.size});
    private u16 *a = (private u16 *)f1, *b = (private u16 *)f2;
    int n = (int)get_sub_group_local_id();
    for (int m = 0; m < {rows}; ++m) {{
        float sum = d[m];
        for (int k = 0; k < 16; ++k)
            sum = fma({convert}(a[m * 16 + k]), {convert}(b[(k / 2 * 16 + n) * 2 + k % 2]), sum);
        d[m] = sum;
    }}"""


def _arithmetic(text: str, operands: list[Operand | int | None]) -> str:
    """A block of elementwise instructions."""
    lines = []
    for index, operand in enumerate(operands):
        if not isinstance(operand, Operand):
            continue
        size = operand.bytes * (1 if operand.uniform else LANES)
        lines.append(f"uchar f{index}[{size}] __attribute__((aligned(64)));")
        if operand.uniform:
            lines.append(f"for (int b = 0; b < {size}; ++b) f{index}[b] = v{index}[b];")
        elif operand.read:
            lines.append(f"collect(f{index}, v{index}, {operand.elements}, {operand.size});")
    kinds: dict[str, str] = {}
    for line in (raw.strip() for raw in text.splitlines()):
        if line.startswith(".decl"):
            lines += _declare(line, kinds)
        elif line not in ("", "{", "}"):
            lines.append(_instruction(line, kinds))
    result = operands[0]
    assert isinstance(result, Operand)
    lines.append(f"keep(v0, f0, {result.elements}, {result.size});")
    return "\n".join("    " + line for line in lines)


def _declare(line: str, kinds: dict[str, str]) -> list[str]:
    match = re.match(r"\.decl\s+(\w+)\s+v_type=(\w)(?:\s+type=(\w+))?\s+num_elts=(\d+)(?:.*alias=<\$(\d),0>)?", line)
    if match is None:
        raise NotImplementedError(line)
    name, group, kind, count, alias = match.groups()
    if group == "P":
        kinds[name] = "P"
        return [f"uchar {name}[{count}];"]
    kind = kind.upper()
    c = _C_TYPES[kind]
    kinds[name] = kind
    if alias is not None:
        return [f"private {c} *{name} = (private {c} *)f{alias};"]
    return [f"{c} {name}[{count}];"]


_INSTRUCTION = re.compile(r"(?:\((\w+)\)\s*)?([\w.]+)\s+\(M1(?:_NM)?,\s*(\d+)\)\s+(.*)")
_OPERAND = re.compile(r"(?:\(abs\))?(\w+)\((\d+),(\d+)\)<(?:(\d+);(\d+),)?(\d+)>")


def _instruction(line: str, kinds: dict[str, str]) -> str:
    match = _INSTRUCTION.match(line)
    if match is None:
        raise NotImplementedError(line)
    predicate, opcode, width, rest = match.groups()
    target, *sources = rest.split()
    values = [_value(source, kinds) for source in sources]
    if opcode.startswith("cmp."):
        comparison = {"ge": ">=", "gt": ">", "lt": "<", "le": "<=", "eq": "==", "ne": "!="}[opcode[4:]]
        statement = f"{target}[e] = {values[0]} {comparison} {values[1]};"
    else:
        kind, place = _place(target, kinds)
        statement = f"{place} = {_stored(kind, _result(opcode, values, line))};"
    if predicate:
        statement = f"if ({predicate}[e]) {statement}"
    return f"for (int e = 0; e < {width}; ++e) {statement}"


def _result(opcode: str, values: list[str], line: str) -> str:
    if opcode.startswith("bfn.x"):
        return _boolean(int(opcode[5:], 16), values)
    if opcode == "fcvt":  # from UB: E5M2, the upper byte of a half
        return f"from_hf((ushort)({values[0]} << 8))"
    operators = {"add": "+", "mul": "*", "and": "&", "shl": "<<", "shr": ">>", "asr": ">>"}
    if opcode in operators:
        return f"{values[0]} {operators[opcode]} {values[1]}"
    if opcode == "mad":
        return f"fma({values[0]}, {values[1]}, {values[2]})"
    if opcode == "mov":
        return values[0]
    raise NotImplementedError(line)


def _boolean(table: int, values: list[str]) -> str:
    """A bitwise function of three by its truth table, in which the sources are 0xAA, 0xCC and 0xF0."""
    terms = []
    for row in range(8):
        if table >> row & 1:
            bits = [value if row >> i & 1 else f"~{value}" for i, value in enumerate(values)]
            terms.append("(" + " & ".join(bits) + ")")
    return " | ".join(terms)


def _place(text: str, kinds: dict[str, str]) -> tuple[str, str]:
    """The type of an operand, and its element e as C."""
    match = _OPERAND.match(text)
    if match is None:
        raise NotImplementedError(text)
    name, row, column, vertical, width, horizontal = match.groups()
    kind = kinds[name]
    first = int(row) * _REGISTER // _SIZES[kind] + int(column)
    index = f"e * {horizontal}" if vertical is None else f"e / {width} * {vertical} + e % {width} * {horizontal}"
    return kind, f"{name}[{first} + {index}]"


def _value(text: str, kinds: dict[str, str]) -> str:
    """A source as a C value: float for HF, BF and F, an integer for the others."""
    immediate = re.fullmatch(r"(0x[0-9A-Fa-f]+|\d+):(\w+)", text)
    if immediate is not None:
        number, kind = immediate[1], immediate[2].upper()
        return {"HF": f"from_hf({number})", "F": f"as_float({number}u)"}.get(kind, f"{number}u")
    kind, place = _place(text, kinds)
    value = {"HF": f"from_hf({place})", "BF": f"from_bf({place})"}.get(kind, place)
    return f"fabs({value})" if text.startswith("(abs)") else value


def _stored(kind: str, value: str) -> str:
    """A C value rounded to what is stored."""
    return {"HF": f"to_hf({value})", "BF": f"to_bf({value})"}.get(kind, f"({_C_TYPES[kind]})({value})")
