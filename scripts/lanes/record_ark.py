"""Writes `xpuquant/ark_releases.json`: what the released auto-round-lib wheels offer for experts, read out of them.

    record_ark.py WHEELS            download the wheels that are missing into WHEELS (200 MB), write the file
    record_ark.py WHEELS --check    only compare, and name what differs; exit status 1 where something does

Operators are functions of the wheel's Python, read as a syntax tree; the instances of device kernels are known by the
names in its library. Releases before 0.10 are the quantizer itself, without libraries, and are left out.
"""

from __future__ import annotations

import ast
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from package_index import Released, released
from record_kernels import recorded, write_or_compare

from xpuquant.ark_releases import COUNTS_ROWS

STORED = Path(__file__).parents[2] / "xpuquant" / "ark_releases.json"
OPERATORS = ("moe", "moe_gemm_decode", "moe_gemm_prefill")
FIRST = (0, 10)
# An instance of a device kernel for experts, mangled: its name, the activations' dtype, true for zero points.
_KERNEL = re.compile(rb"_ZTSN3ark\d+moe_\w+?_detail\d+(MoE(?:Dequant|Decode)Kernel[A-Za-z0-9]+?)IN(\w+?)ELb1E")


def wheels() -> Iterator[Released]:
    """One wheel a release: of Python 3.11, or the oldest after it, for Linux."""
    found: dict[str, Released] = {}
    for file in released("auto-round-lib", ".whl"):
        if file.number >= FIRST and "manylinux" in file.name and "-cp310-" not in file.name:
            held = found.get(file.version)
            found[file.version] = file if held is None else min(held, file, key=lambda one: one.name)
    yield from found.values()


def read(path: Path) -> dict[str, Any]:
    """What one wheel offers."""
    with zipfile.ZipFile(path) as wheel:
        source = wheel.read("auto_round_kernel/__init__.py").decode()
        library = next(name for name in wheel.namelist() if "auto_round_kernel_xpu" in name and name.endswith(".so"))
        binary = wheel.read(library)
    functions = {node.name: node.args for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    dtypes: dict[str, set[bytes]] = {}
    for name, dtype in _KERNEL.findall(binary):
        dtypes.setdefault(name.decode(), set()).add(dtype)
    counts = "always" if "moe" in functions and "Sum of num_tokens_per_expert" in source else None
    return {
        "schemas": {name: arguments(functions[name]) if name in functions else None for name in OPERATORS},
        "zero_points": sorted(name for name, found in dtypes.items() if len(found) == 2 and "FP8" not in name),
        "counts_rows": COUNTS_ROWS if COUNTS_ROWS in source else counts,
        # What brought the switch made moving bits the default (sdist, wrapper/include/sycl_tla_moe_dequant.hpp).
        "decodes_nan_as_480": b"ARK_FP8_DECODE_MODE" in binary,
    }


def arguments(args: ast.arguments) -> str:
    """Without annotations."""
    for argument in (*args.posonlyargs, *args.args, *args.kwonlyargs):
        argument.annotation = None
    return ast.unparse(args)


def main() -> int:
    folder, *flags = sys.argv[1:]
    found = recorded((file, read(file.fetch(Path(folder)))) for file in wheels())
    return write_or_compare(STORED, found, flags == ["--check"])


if __name__ == "__main__":
    sys.exit(main())
