"""Writes `xpuquant/xpu_releases.json`: what the released vllm-xpu-kernels wheels offer, read out of the wheels.

    record_kernels.py WHEELS            download the wheels that are missing into WHEELS (1.2 GB), write the file
    record_kernels.py WHEELS --check    only compare, and name what differs; exit status 1 where something does

Schemas are strings in the libraries. The experts per token are those for which `moe_gather` has instances, by the
names of its kernels. What `XpuFusedMoe` takes is read in its Python, as a syntax tree.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from package_index import Released, released

STORED = Path(__file__).parents[2] / "xpuquant" / "xpu_releases.json"
LIBRARIES = {
    "_xpu_C": (
        *("int4_gemm_w4a16", "fp8_gemm", "fp8_gemm_w8a16", "fp4_gemm", "cutlass_grouped_gemm_interface"),
        *("is_xe2_arch", "is_xe3_arch"),
    ),
    "_moe_C": ("remap_hidden_states", "moe_gather"),
    "_C": (
        *("per_token_group_fp8_quant", "per_token_group_quant_mxfp4", "silu_and_mul", "gelu_and_mul"),
        *("gelu_tanh_and_mul", "swigluoai_and_mul", "swiglustep_and_mul", "relu2_no_mul", "situ_and_mul"),
    ),
}
"""Library → the operators that serving reaches, itself or through `XpuFusedMoe`."""


def read(path: Path) -> dict[str, Any] | None:
    """What one wheel offers; None for a wheel without libraries."""
    with zipfile.ZipFile(path) as wheel:
        files = {name.split("/")[-1].split(".")[0]: name for name in wheel.namelist() if name.endswith((".so", ".py"))}
        if "_xpu_C" not in files:
            return None
        binaries = {library: wheel.read(files[library]) for library in (*LIBRARIES, "libgrouped_gemm_xe_2")}
        interface = wheel.read(files["fused_moe_interface"]).decode()
    schemas = {}
    for library, operators in LIBRARIES.items():
        for operator in operators:
            pattern = rb"\0" + operator.encode() + rb"\([^\0]{1,600}\) -> [^\0]{1,40}\0"
            found = {match[1:-1].decode() for match in re.findall(pattern, binaries[library])}
            if len(found) > 1:
                raise ValueError(f"{path.name}: {operator} has {len(found)} schemas")
            schemas[operator] = " ".join(found.pop().split()) if found else None
    return {
        "schemas": schemas,
        "top_k": sorted({int(k) for k in re.findall(rb"MoeGatherI[A-Za-z0-9_]*?ELi(\d+)ELi\d+E", binaries["_moe_C"])}),
        "grouped_gemm_clears_its_counter": b"_ZN2at4_ops5zeros4call" in binaries["libgrouped_gemm_xe_2"],
        "w8a16_takes_rectangular_blocks": b"Per-channel weight scale must have N=" in binaries["_xpu_C"],
        **read_interface(interface),
    }


def read_interface(source: str) -> dict[str, Any]:
    """Of `fused_moe_interface.py`: the constructor and what it knows."""
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "XpuFusedMoe"]
    functions = [node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]
    # Before 0.1.12 there was no class.
    functions = functions or [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "xpu_fused_moe"]
    named = {function.name: function for function in functions}
    first = functions[0]
    compared = [
        node.comparators[0].value
        for node in ast.walk(first)
        if isinstance(node, ast.Compare)
        and ast.unparse(node.left).removeprefix("self.") == "activation"
        and isinstance(node.comparators[0], ast.Constant)
    ]
    switches = [
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith("VLLM_XPU_FUSED_MOE")
    ]
    kernel = named.get("_apply_kernel", first)
    return {
        "xpu_fused_moe": [argument.arg for argument in first.args.args if argument.arg != "self"] if classes else None,
        "apply": [argument.arg for argument in named["apply"].args.args[1:]] if classes else None,
        "activations": sorted(set(compared)),
        "switches": sorted(switches),
        "zeroes_rows_without_experts": "masked_fill" in ast.unparse(kernel),
        "marks_converted_int4": [
            node.args[1].value
            for node in ast.walk(first)
            if isinstance(node, ast.Call)
            and ast.unparse(node.func) == "hasattr"
            and isinstance(node.args[1], ast.Constant)
        ],
    }


def recorded(wheels: Iterable[tuple[Released, dict[str, Any] | None]]) -> dict[str, Any]:
    """Everything, with what does not change from release to release written once: value since version.

    Args:
        wheels: with what each offers, `schemas` and any facts; None: nothing. Oldest first.
    """
    releases: dict[str, Any] = {}
    history: dict[str, dict[str, Any]] = {}
    schemas: dict[str, dict[str, Any]] = {}
    for file, facts in wheels:
        releases[file.version] = {"wheel": file.name, "sha256": file.sha256}
        if facts is None:
            releases[file.version]["empty"] = True
            continue
        for table, values in ((schemas, facts.pop("schemas")), (history, facts)):
            for name, value in values.items():
                since = table.setdefault(name, {})
                if not since or list(since.values())[-1] != value:
                    since[file.version] = value
    return {"releases": releases, "schemas": schemas, "facts": history}


def written(found: dict[str, Any]) -> str:
    """One line an entry, so that a difference between two recordings is short."""
    parts = []
    for part, entries in found.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()]
        parts.append(f" {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def write_or_compare(stored: Path, found: dict[str, Any], check: bool) -> int:
    """Write the file, or compare with it and name what differs; 1 where something does."""
    text = written(found)
    if not check:
        stored.write_text(text)
        return 0
    if text == stored.read_text():
        print(f"{stored.name}: what the wheels offer")
        return 0
    old, new = json.loads(stored.read_text()), json.loads(text)
    for part, entries in new.items():
        for name in entries.keys() | old.get(part, {}).keys():
            if entries.get(name) != old.get(part, {}).get(name):
                print(
                    f"{stored.name}: {part}.{name} is {old.get(part, {}).get(name)}, the wheels say {entries.get(name)}"
                )
    return 1


def main() -> int:
    folder, *flags = sys.argv[1:]
    found = recorded((file, read(file.fetch(Path(folder)))) for file in released("vllm-xpu-kernels", ".whl"))
    return write_or_compare(STORED, found, flags == ["--check"])


if __name__ == "__main__":
    sys.exit(main())
