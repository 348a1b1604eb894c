"""What the vLLM plugin uses of vLLM, and whether a release has it in the shape that the plugin assumes; without vLLM.

Imports, calls of what is imported, and methods that override vLLM's are found in the plugin's own source. What it reads
of objects that vLLM hands it is declared in `MEMBERS`; an attribute that is neither ours, nor torch's, nor declared is
found by `undeclared`. A release is known by its index (`tests/serving/vllm_names.json`), read out of its sources by
`scripts/lanes/vllm-names --record`.
"""

from __future__ import annotations

import ast
import concurrent.futures
import enum
import inspect
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "xpuquant" / "vllm"
STORED = ROOT / "tests" / "serving" / "vllm_names.json"
Index = Mapping[str, Any]

_LAYERS = "vllm.model_executor.layers"
# Object → what the plugin reads of it or calls on it; a call is shown as it is made.
MEMBERS: dict[str, tuple[str, ...]] = {
    "vllm.config.VllmConfig": ("quant_config", "model_config"),
    "vllm.platforms.interface.Platform": ("is_xpu()",),
    f"{_LAYERS}.fused_moe.routed_experts.RoutedExperts": (
        *("moe_config", "expert_map", "activation", "swiglu_limit", "global_num_experts"),
        *("apply_router_weight_on_input", "quant_method"),
    ),
    f"{_LAYERS}.fused_moe.config.FusedMoEConfig": ("moe_parallel_config", "ep_rank", "ep_size", "experts_per_token"),
    f"{_LAYERS}.fused_moe.config.FusedMoEParallelConfig": ("tp_rank", "tp_size"),
    f"{_LAYERS}.fused_moe.fused_moe_method_base.FusedMoEMethodBase": ("moe",),
    f"{_LAYERS}.linear.LinearBase": ("prefix", "tp_rank", "tp_size", "quant_method", "update_param_tp_status()"),
    f"{_LAYERS}.linear.QKVParallelLinear": ("num_kv_head_replicas",),
    f"{_LAYERS}.vocab_parallel_embedding.ParallelLMHead": ("shard_indices",),
    f"{_LAYERS}.vocab_parallel_embedding.VocabParallelEmbeddingShardIndices": (
        *("org_vocab_start_index", "org_vocab_end_index"),
    ),
    f"{_LAYERS}.quantization.base_config.QuantizationConfig": ("packed_modules_mapping",),
    f"{_LAYERS}.quantization.base_config.QuantizeMethodBase": ("tie_weights(layer, embed_tokens)",),
    "vllm.model_executor.model_loader.base_loader.BaseModelLoader": ("create_model(vllm_config, *rest)",),
    "vllm.model_executor.models.utils.WeightsMapper": ("map_name(name)",),
    "vllm.model_executor.models.llama4.Llama4ForCausalLM": ("permute_qk_weight_for_rotary(name, loaded)",),
    "vllm.model_executor.parameter.ModelWeightParameter": ("load_column_parallel_weight(loaded)", "tp_rank"),
    "vllm.model_executor.parameter.PackedvLLMParameter": (
        *("load_column_parallel_weight(loaded)", "packed_dim", "packed_factor", "output_dim", "tp_rank"),
    ),
    f"{_LAYERS}.quantization": ("QUANTIZATION_METHODS",),
}
# Module → words of its source: names by which vLLM finds the plugin, or reads what the plugin sets.
WORDS = {
    f"{_LAYERS}.linear": ("weight_block_size", "WEIGHT_LOADER_V2_SUPPORTED", "weight_loader_v2"),
    "vllm.model_executor.model_loader.base_loader": ("load_weights",),
    "vllm.plugins": ("vllm.general_plugins",),
    "vllm.models.deepseek_v4.attention": ("is_bmm",),
}


@dataclass(frozen=True)
class Use:
    """One thing that the plugin relies on.

    name   of the module, class, function or member, in full
    where  file of the plugin and line, or "declared"
    call   the arguments it is called with, or the signature that overrides it; None where it is only named
    """

    name: str
    where: str
    call: ast.Call | ast.arguments | None = None

    @property
    def overrides(self) -> bool:
        return isinstance(self.call, ast.arguments)


@cache
def sources() -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text()) for path in sorted(PLUGIN.glob("*.py"))}


@cache
def uses() -> tuple[Use, ...]:
    """Everything, from the plugin's source and from the declarations."""
    found = [use for file, tree in sources().items() for use in _of(file, tree)]
    for owner, members in MEMBERS.items():
        for member in members:
            name, paren, _ = member.partition("(")
            call = ast.parse(member, mode="eval").body if paren else None
            assert call is None or isinstance(call, ast.Call)
            found.append(Use(f"{owner}.{name}", "declared", call))
    return tuple(found)


def _of(file: str, tree: ast.Module) -> Iterator[Use]:
    named: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                named[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield Use(f"{node.module}.{alias.name}", f"{file}:{node.lineno}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in named:
            yield Use(named[node.func.id], f"{file}:{node.lineno}", node)
        if isinstance(node, ast.ClassDef):
            for base in [named[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in named]:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                        yield Use(f"{base}.{method.name}", f"{file}:{method.lineno}", method.args)


@cache
def undeclared(more: str = "") -> set[str]:
    """Attributes in the plugin that are not ours, not torch's or Python's, and not declared.

    Args:
        more: Python source that is taken for a part of the plugin.
    """
    known = {name.partition("(")[0] for members in MEMBERS.values() for name in members}
    trees = [ast.parse(path.read_text()) for path in (ROOT / "xpuquant").rglob("*.py")]
    trees += [ast.parse(path.read_text()) for path in (ROOT / "formats").glob("*.py")]
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                known.add(node.attr)  # whoever sets an attribute may read it
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)  # fields of data classes
    for owner in _others():
        known |= set(dir(owner))
    # Parameters under the names of the stored tensors.
    known |= {"qweight", "qzeros", "scales", "weight_scale", "g_idx"}
    plugin = [*sources().values(), ast.parse(more)]
    return {node.attr for tree in plugin for node in ast.walk(tree) if isinstance(node, ast.Attribute)} - known


class _Member(enum.Enum):
    one = 1


def _others() -> tuple[Any, ...]:
    import numpy as np
    import torch

    return (
        *(torch, torch.Tensor, torch.nn, torch.nn.Module, torch.nn.Parameter, torch.finfo, torch.dtype, torch.device),
        *(torch.overrides.TorchFunctionMode, str, list, dict, set, int, bytes, os, np, Path, logging, logging.Logger),
        *(concurrent.futures.ThreadPoolExecutor, _Member.one),
    )


def problem(use: Use, index: Index) -> str | None:
    """What is wrong with a use in a release, by its index; None where nothing is."""
    known = index["names"].get(use.name)
    if known is None:
        # A method of ours that vLLM's class does not have overrides nothing.
        return None if use.overrides else "is not there"
    if use.call is None or known["kind"] == "attribute" or known.get("arguments") is None:
        return "cannot be called" if isinstance(use.call, ast.Call) and known["kind"] == "attribute" else None
    theirs = signature(known["arguments"])
    if not isinstance(use.call, ast.arguments):
        return _call_problem(use.call, theirs)
    return _override_problem(ast.unparse(use.call), known["arguments"])


def signature(arguments: str) -> inspect.Signature:
    """Of a function with these arguments, without `self` or `cls`; whatever the defaults are, they are None here."""
    tree = ast.parse(f"def f({arguments}): ...").body[0]
    assert isinstance(tree, ast.FunctionDef)
    kinds = inspect.Parameter
    args = tree.args
    plain = [*args.posonlyargs, *args.args]
    first_default = len(plain) - len(args.defaults)
    parameters = []
    for i, arg in enumerate(plain):
        kind = kinds.POSITIONAL_ONLY if i < len(args.posonlyargs) else kinds.POSITIONAL_OR_KEYWORD
        parameters.append(kinds(arg.arg, kind, default=None if i >= first_default else kinds.empty))
    if args.vararg:
        parameters.append(kinds(args.vararg.arg, kinds.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(kinds(arg.arg, kinds.KEYWORD_ONLY, default=None if default is not None else kinds.empty))
    if args.kwarg:
        parameters.append(kinds(args.kwarg.arg, kinds.VAR_KEYWORD))
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    return inspect.Signature(parameters)


def _call_problem(call: ast.Call, theirs: inspect.Signature) -> str | None:
    starred = any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords)
    values = [None] * sum(not isinstance(a, ast.Starred) for a in call.args)
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
    try:
        (theirs.bind_partial if starred else theirs.bind)(*values, **named)
    except TypeError as error:
        return f"is called otherwise: {error}, it takes {theirs}"
    return None


def _override_problem(ours: str, theirs: str) -> str | None:
    mine, base = signature(ours).parameters, signature(theirs).parameters
    kinds = {parameter.kind for parameter in mine.values()}
    for name, parameter in base.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or name in mine:
            continue
        if parameter.VAR_KEYWORD not in kinds and parameter.VAR_POSITIONAL not in kinds:
            return f"has an argument that ours does not take: {name}"
    extensible = any(parameter.kind == parameter.VAR_KEYWORD for parameter in base.values())
    for name, parameter in mine.items():
        plain = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if plain and parameter.default is parameter.empty and name not in base and not extensible:
            return f"is not given what ours wants: {name}"
    return None


def missing_overrides(index: Index) -> list[str]:
    """Abstract methods of vLLM's base classes that no class of the plugin defines."""
    defined = {
        node.name: {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    bases = {
        node.name: [base.id for base in node.bases if isinstance(base, ast.Name)]
        for tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    names = {use.name.rpartition(".")[2]: use.name for use in uses() if use.where != "declared" and use.call is None}
    return [
        f"{names[base]}.{method}"
        for ours, parents in bases.items()
        for base in parents
        if base in names
        for method in index["names"][names[base]].get("abstract", [])
        if method not in defined[ours]
    ]


def missing_words(index: Index) -> list[str]:
    """Words of `WORDS` that the sources of a release lack."""
    return [
        f"{module}: {word}" for module, words in WORDS.items() for word in words if word not in index["words"][module]
    ]


def recorded() -> dict[str, Index]:
    """Version → index."""
    stored: dict[str, Index] = json.loads(STORED.read_text())
    return stored


class Sources:
    """The Python files of one release, as syntax trees."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._trees: dict[str, ast.Module | None] = {}

    def path(self, module: str) -> Path | None:
        base = self.root / Path(*module.split("."))
        return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()), None)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self.path(module)
            self._trees[module] = None if path is None else ast.parse(path.read_text())
        return self._trees[module]

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """(module that defines it, definition) of a name of a module, through what it imports."""
        tree = self.tree(module)
        if tree is None:
            return None
        stars = []
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                return module, node
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
                return module, node
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                return module, node
            if isinstance(node, ast.ImportFrom):
                origin = self._absolute(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(origin, alias.name)
                    if alias.name == "*":
                        stars.append(origin)
        return next((found for origin in stars if (found := self.find(origin, name)) is not None), None)

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        path = self.path(module)
        package = module.split(".") if path is not None and path.name == "__init__.py" else module.split(".")[:-1]
        package = package[: len(package) - node.level + 1]
        return ".".join([*package, *([node.module] if node.module else [])])

    def ancestry(self, module: str, node: ast.ClassDef) -> Iterator[ast.ClassDef]:
        """The class and those of vLLM that it derives from, nearest first."""
        yield node
        for base in node.bases:
            plain = base.value if isinstance(base, ast.Subscript) else base
            found = self.find(module, plain.id) if isinstance(plain, ast.Name) else None
            if found is not None and isinstance(found[1], ast.ClassDef):
                yield from self.ancestry(found[0], found[1])

    def entry(self, name: str) -> dict[str, Any] | None:
        """What is recorded of a module, class, function, or member of a class; None where the release has none."""
        if self.tree(name) is not None:
            return {"kind": "module"}
        owner, _, last = name.rpartition(".")
        found = self.find(owner, last)
        if found is not None:
            return self._described(*found)
        module, _, class_name = owner.rpartition(".")
        found = self.find(module, class_name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return None
        return self._member(found[0], found[1], last)

    def _described(self, module: str, node: ast.AST) -> dict[str, Any]:
        if isinstance(node, ast.FunctionDef):
            return {"kind": "function", "arguments": _arguments(node)}
        if not isinstance(node, ast.ClassDef):
            return {"kind": "value"}
        entry: dict[str, Any] = {"kind": "class"}
        init = self._member(module, node, "__init__")
        if init is not None:
            entry["arguments"] = init["arguments"]
        concrete: set[str] = set()
        abstract: list[str] = []
        for owner in self.ancestry(module, node):
            for method in [one for one in owner.body if isinstance(one, ast.FunctionDef)]:
                marked = any("abstractmethod" in ast.unparse(decorator) for decorator in method.decorator_list)
                if marked and method.name not in concrete:
                    abstract.append(method.name)
                concrete.add(method.name)
        return entry | ({"abstract": sorted(set(abstract))} if abstract else {})

    def _member(self, module: str, node: ast.ClassDef, name: str) -> dict[str, Any] | None:
        for owner in self.ancestry(module, node):
            for one in ast.walk(owner):
                if isinstance(one, ast.FunctionDef) and one.name == name and one in owner.body:
                    plain = all("property" not in ast.unparse(decorator) for decorator in one.decorator_list)
                    return {"kind": "method", "arguments": _arguments(one)} if plain else {"kind": "attribute"}
                targets = one.targets if isinstance(one, ast.Assign) else [getattr(one, "target", None)]
                if isinstance(one, ast.Assign | ast.AnnAssign) and any(
                    (isinstance(t, ast.Name) and t.id == name and one in owner.body)
                    or (isinstance(t, ast.Attribute) and t.attr == name and ast.unparse(t.value) == "self")
                    for t in targets
                ):
                    return {"kind": "attribute"}
        return None


def _arguments(function: ast.FunctionDef) -> str:
    """Without annotations: they may name anything."""
    for node in ast.walk(function.args):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.unparse(function.args)


def index_of(root: Path, sdist: str, sha256: str) -> dict[str, Any]:
    """What a release has of everything that the plugin uses. `root` is the folder that holds the package `vllm`."""
    sources = Sources(root)
    names = {name: sources.entry(name) for name in sorted({use.name for use in uses()})}
    words = {}
    for module, wanted in WORDS.items():
        path = sources.path(module)
        text = "" if path is None else path.read_text()
        words[module] = [word for word in wanted if word in text]
    return {
        "sdist": sdist,
        "sha256": sha256,
        "names": {n: e for n, e in names.items() if e is not None},
        "words": words,
    }
