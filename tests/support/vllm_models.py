"""Under which names vLLM's model classes ask for their layers, and which of them rearrange weights; without vLLM.

Read out of a release's sources: from the class that its registry has for an architecture to every class that it is made
of. What is recorded (`tests/serving/vllm_models.json`, by `scripts/lanes/vllm-models --record`) is what the plugin has
to know: layers that are asked for under another name than their attribute's, which is a part of the path that tensors
are loaded by, and functions that load weights and rearrange them.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STORED = ROOT / "tests" / "serving" / "vllm_models.json"
WITHIN = ("vllm.model_executor.models.", "vllm.models.", "vllm.model_executor.layers.mamba.")
"""Packages whose classes models are made of."""
MORE = (
    *("DeepseekVLV2ForCausalLM", "KananaVForConditionalGeneration", "OpenPanguVLForConditionalGeneration"),
    *("PixtralForConditionalGeneration", "Step3p5ForCausalLM", "Llama4ForCausalLM", "DeepseekV3ForCausalLM"),
    *("Mamba2ForCausalLM", "GlmMoeDsaForCausalLM", "KimiK25ForConditionalGeneration"),
    *("K2HorizonForCausalLM", "TeleChat2ForCausalLM", "Plamo3ForCausalLM", "MiniMaxM3SparseForCausalLM"),
)
"""Architectures beside those of the families: language models inside them, and others whose names differ."""
_REARRANGE = {"permute", "transpose", "t", "view", "reshape", "unflatten", "flatten", "chunk", "split", "cat", "stack"}
_LOADS = re.compile(r"load|permute|remap|_split")


@dataclass
class Found:
    """What is known of one architecture in one release.

    model      file and class; empty where the release has none
    linears    `Class.attribute` of linears, or of what contains some → the name they are asked for under
    stacks     the same, of what contains routed experts
    rearranges `Class.function` that loads weights → the methods of tensors it calls
    """

    model: str = ""
    linears: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, str] = field(default_factory=dict)
    rearranges: dict[str, str] = field(default_factory=dict)


class Sources:
    """The Python files of a release, below the folder that has the package `vllm`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019
    def tree(self, module: str) -> ast.Module | None:
        path = self.root / module.replace(".", "/")
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.exists():
                return ast.parse(candidate.read_text())
        return None

    @cache  # noqa: B019
    def registry(self) -> dict[str, tuple[str, str]]:
        """Architecture → module and class."""
        tree = self.tree("vllm.model_executor.models.registry")
        found: dict[str, tuple[str, str]] = {}
        for node in ast.walk(tree) if tree else ():
            for key, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple) and len(value.elts) == 2:
                    module, name = (getattr(part, "value", "") for part in value.elts)
                    module = str(module) if "." in str(module) else f"vllm.model_executor.models.{module}"
                    found.setdefault(str(key.value), (module, str(name)))
        return found

    @cache  # noqa: B019
    def find(self, module: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """A class by the name that a module knows it by, and the module that defines it."""
        tree = self.tree(module)
        for node in ast.walk(tree) if tree else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
                other = _absolute(self.root, module, node)
                if other != module and f"{other}.".startswith(WITHIN):
                    found = self.find(other, next(one.name for one in node.names if (one.asname or one.name) == name))
                    if found is not None:
                        return found
        return None

    @cache  # noqa: B019
    def node(self, module: str, name: str) -> ast.ClassDef:
        found = self.find(module, name)
        assert found is not None
        return found[1]

    @cache  # noqa: B019
    def parts(self, module: str, name: str) -> tuple[tuple[str, str], ...]:
        """The bases of a class, and the classes that it constructs or names."""
        names = {n.id for n in ast.walk(self.node(module, name)) if isinstance(n, ast.Name) and n.id[:1].isupper()}
        found = [self.find(module, one) for one in sorted(names - {name})]
        return tuple((one[0], one[1].name) for one in found if one is not None)

    @cache  # noqa: B019
    def made_of(self, module: str, name: str) -> tuple[tuple[str, str], ...]:
        """A class, its parts, and theirs."""
        found: dict[tuple[str, str], None] = {}
        waiting = [(module, name)]
        while waiting:
            one = waiting.pop()
            if one not in found:
                found[one] = None
                waiting += self.parts(*one)
        return tuple(found)


def _absolute(root: Path, module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    is_package = (root / module.replace(".", "/") / "__init__.py").exists()
    parts = module.split(".")
    base = parts[: len(parts) - node.level + is_package]
    return ".".join([*base, *filter(None, [node.module])])


def architectures() -> set[str]:
    """Those of the families on record, and `MORE`."""
    record = json.loads((ROOT / "xpuquant" / "families.json").read_text())["families"]
    return {family["plan"]["architecture"] for family in record.values()} | set(MORE)


def read(root: Path, architectures: Iterable[str]) -> dict[str, Any]:
    """The index of a release."""
    sources = Sources(root)
    return {name: vars(_of(sources, name)) for name in sorted(architectures)}


def _of(sources: Sources, architecture: str) -> Found:
    entry = sources.registry().get(architecture)
    start = sources.find(*entry) if entry is not None else None
    if entry is None or start is None:
        return Found()
    found = Found(f"{start[0].removeprefix('vllm.')}.{start[1].name}")
    for module, name in sources.made_of(start[0], start[1].name):
        node = sources.node(module, name)
        for attribute, asked, callee in _asked(node):
            if asked == attribute:
                continue
            kind = sources.find(module, callee)
            inside = [sources.node(*one) for one in sources.made_of(kind[0], kind[1].name)] if kind else []
            if any(map(_has_stack, inside)):
                found.stacks[f"{name}.{attribute}"] = asked
            elif callee.endswith("Linear") or any(map(_has_linear, inside)):
                found.linears[f"{name}.{attribute}"] = asked
        for function in ast.walk(node):
            if isinstance(function, ast.FunctionDef) and _LOADS.search(function.name):
                calls = " ".join(sorted(set(_rearranging(function))))
                if calls:
                    found.rearranges[f"{name}.{function.name}"] = calls
    return found


def _rearranging(function: ast.FunctionDef) -> Iterator[str]:
    """Methods of tensors that a function calls; names are split, too."""
    for one in ast.walk(function):
        if not (isinstance(one, ast.Call) and isinstance(one.func, ast.Attribute) and one.func.attr in _REARRANGE):
            continue
        if not re.search(r"name|key|prefix|^n$|^'", ast.unparse(one.func.value)):
            yield one.func.attr


def _asked(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Attribute, the last parts of the name it is asked for under, and what is called, where a prefix can be read."""
    for one in ast.walk(node):
        if not (isinstance(one, ast.Assign) and isinstance(one.value, ast.Call)):
            continue
        target, callee = ast.unparse(one.targets[0]), ast.unparse(one.value.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in one.value.keywords}
        if not re.fullmatch(r"self\.\w+", target) or not callee.isidentifier():
            continue
        if "prefix" in keywords:
            yield target.removeprefix("self."), _name(keywords["prefix"]), callee
        elif callee.endswith("ParallelLinear") and keywords.get("quant_config", "None") != "None":
            yield target.removeprefix("self."), "", callee


def _name(prefix: str) -> str:
    """What a model puts behind its own prefix."""
    match = re.fullmatch(r"f'\{prefix\}\.([\w.]+)'|maybe_prefix\(prefix, '([\w.]+)'\)|'([\w.]+)'", prefix)
    return next(filter(None, match.groups())) if match else prefix


def _has_stack(node: ast.ClassDef) -> bool:
    return any("FusedMoE" in callee for callee in _called(node))


def _has_linear(node: ast.ClassDef) -> bool:
    return any(callee.endswith("Linear") for callee in _called(node))


def _called(node: ast.ClassDef) -> set[str]:
    return {one.func.id for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)}


def recorded() -> dict[str, Mapping[str, Any]]:
    """Release → architecture → what was found."""
    found: dict[str, Mapping[str, Any]] = json.loads(STORED.read_text())
    return found
