"""One word, one meaning: a public name stands at the top of one module of the product."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("convert", "formats", "kernels", "xpuquant")

ALLOWED = {
    "Array": "any numpy array, in rooms that import nothing of each other",
    "convert": "a command, its function in the API, and what both run",
    "finish": "a command, and its function in the API",
    "diff": "a command, and its function in the API",
    "doctor": "a command, and its function in the API",
    "inspect": "a command, and its function in the API",
    "push": "a command, its function in the API, and what both run",
    "verify": "a command, its function in the API, and what both run",
    "run": "a command line; a compiled kernel",
    "register": "vLLM's word for what a plugin does: the plugin, its configuration, its loader",
    "dequantize": "a stored layer as numbers: in numpy for verification, in torch for serving, which share nothing",
    "linear": "x W^T: what a layer computes, and the operator that computes it",
    "supported": "whether a foreign library can be used: oneDNN, vLLM",
    "explain": "an error as one line, of any command, of the Hub; a command, and its function in the API",
    "gated": "act(gate) * up: as serving computes it, as the shipped operator does",
    "gather": "what a card says; the shipped operator of that name",
    "Module": "a module of a model; of SPIR-V code",
    "Stored": "a module of a repo: as verification reads it, as a server's parameter",
}
"""Name → why several modules define it."""


def public_names(module: ast.Module) -> Iterator[str]:
    """What a module defines at its top: functions, classes, constants and type aliases. Single letters are type
    variables."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            continue
        yield from (name for name in names if not name.startswith("_") and len(name) > 1)


def test_no_public_name_is_defined_in_two_modules():
    places: dict[str, list[str]] = defaultdict(list)
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for name in set(public_names(ast.parse(path.read_text()))):
                places[name].append(str(path.relative_to(ROOT)))
    several = {name: where for name, where in places.items() if len(where) > 1}
    assert {name: where for name, where in several.items() if name not in ALLOWED} == {}
    assert ALLOWED.keys() - several.keys() == set(), "allowed, but defined once: take it off the list"


def test_no_function_is_called_like_its_module():
    """`from package.name import name` says nothing of which is meant."""
    twins = [
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (path.parent.name if path.stem == "__init__" else path.stem) in public_names(ast.parse(path.read_text()))
    ]
    assert twins == []
