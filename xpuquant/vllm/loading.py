"""From the weight stream into the model: experts by whole stacks, the rest by vLLM, and nothing missing.

vLLM's model loaders treat stacked expert tensors in four ways: some split them, some take only names of
single experts, some permute them, and some drop them without a word. So stacks are taken out of the
stream here and written into their layer directly. vLLM checks no missing weights where a model is
quantized; this module does, by name.

On the CPU stacks stay in the file's pages, as linears do (`adoption.py`): nothing is copied, and the page cache is the
only memory that they take.

The hook is `BaseModelLoader.create_model`, the one place that every load format passes: the new model's
`load_weights` is wrapped where the model is quantized by us, and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from xpuquant.errors import DamagedError, UnsupportedError, one_line
from xpuquant.formats.architecture import ALIASES
from xpuquant.formats.scheme import Scheme
from xpuquant.layers import expert_tensors, linear_tensors
from xpuquant.vllm.adoption import adopt, settle
from xpuquant.vllm.by_path import go_by_path
from xpuquant.vllm.config import XpuquantConfig
from xpuquant.vllm.copying import HostCopies
from xpuquant.vllm.experts import XpuquantExpertsMethod
from xpuquant.vllm.linear import XpuquantLinearMethod
from xpuquant.vllm.members import MEMBERS, XpuquantMembersMethod
from xpuquant.vllm.reordered import follow_or_refuse
from xpuquant.xpu_ops import cast_when_loaded

_FIX = "convert again, or download the repo again"
Weights = Iterable[tuple[str, torch.Tensor]]


class Intake:
    """Watches one load: which tensors came, which parameters they filled."""

    def __init__(self, model: torch.nn.Module, config: XpuquantConfig, dtype: torch.dtype) -> None:
        self.model = model
        self.dtype = dtype
        self.config = config
        self.experts: dict[str, tuple[str, Any]] = {}
        for name, layer in model.named_modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(method, XpuquantExpertsMethod):
                stored = config.stack_of(method.prefix)
                assert stored is not None, "the method was made from it"
                self.experts[stored] = (name, layer)
        self.seen: set[str] = set()
        self.filled: set[str] = set()
        # Mixtral's block has two names; vLLM's model loader knows one.
        self.renames = [
            (ours, theirs) for theirs, ours in ALIASES if any(theirs in name for name, _ in self.experts.values())
        ]

    def stream(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """`weights` without the stacks of experts, which go into their layers.

        Raises:
            DamagedError: a tensor of a quantized module that the config does not announce, or of a dtype
                that a copy would silently convert.
            UnsupportedError: scales that the model's dtype cannot hold.
        """
        for name, tensor in weights:
            self.seen.add(name)
            module, _, suffix = name.rpartition(".")
            scheme = self.config.stored.get(module)
            if scheme is None:
                if suffix in _ONLY_QUANTIZED:
                    raise DamagedError(
                        f"{one_line(name)} belongs to no module that config.json lists as quantized; {_FIX}"
                    )
            elif suffix != "bias" or scheme.experts:
                _check(name, suffix, scheme, tensor)
                check_range(name, suffix, scheme, tensor, self.dtype)
            if module not in self.experts:
                for stored, known in self.renames:
                    name = name.replace(stored, known)
                yield name if scheme is None else self.config.offered(name), tensor
                continue
            prefix, layer = self.experts[module]
            if not adopt(getattr(layer, suffix, None), tensor):
                layer.quant_method.load(layer, suffix, tensor)
            self.filled.add(f"{prefix}.{suffix}")

    def finish(self, loaded: set[str] | None) -> None:
        """Raise DamagedError, in one line, where a tensor or a parameter is missing."""
        wanted = {f"{module}.{suffix}" for module, scheme in self.config.stored.items() for suffix in names_of(scheme)}
        missing = sorted(wanted - self.seen) or self._unfused()
        if not missing and loaded is not None:
            # A module that is shared has several paths, and is loaded by one: in vLLM 0.33's models of Transformers a
            # block's shared experts are a part of its routed ones, too.
            paths: dict[torch.nn.Parameter, list[str]] = {}
            for name, param in self.model.named_parameters(remove_duplicate=False):
                paths.setdefault(param, []).append(name)
            for param, names in paths.items():
                of_member = f".{MEMBERS}." in names[0]
                came = getattr(param, "filled", False) if of_member else not (loaded | self.filled).isdisjoint(names)
                missing += [] if came or not param.numel() else names[:1]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DamagedError(f"tensor {one_line(missing[0])}{more} is missing from the repo; {_FIX}")

    def _unfused(self) -> list[str]:
        """Members of fused layers whose siblings came without them: vLLM would leave their rows as they are."""
        came: dict[str, set[str]] = {}
        for name in self.seen:
            module, _, suffix = name.rpartition(".")
            came.setdefault(self.config.mapped(module) or module, set()).add(suffix)
        missing = set()
        for layer in self.model.modules():
            members = self.config.members(layer.prefix) if isinstance(layer, LinearBase) else []
            mixed = isinstance(getattr(layer, "quant_method", None), XpuquantMembersMethod)
            suffixes = set[str]().union(*(came.get(member, ()) for member in members))
            for member in members:
                absent = suffixes - came.get(member, set())
                missing |= {f"{member}.{suffix}" for suffix in (absent & {"bias"} if mixed else absent)}
        return sorted(missing)


def names_of(scheme: Scheme) -> set[str]:
    """The suffixes of the tensors that a module of this scheme has, besides a linear's bias."""
    sizes = (1, 1, 1) if scheme.experts else (1, 1)
    return set(expert_tensors(scheme, *sizes) if scheme.experts else linear_tensors(scheme, *sizes))


# Suffixes that nothing but a quantized module has.
_ONLY_QUANTIZED = frozenset({"qweight", "qzeros", "scales", "g_idx", "weight_scale", "global_scale"})


def _check(name: str, suffix: str, scheme: Scheme, tensor: torch.Tensor) -> None:
    unit = expert_tensors(scheme, 1, 1, 1) if scheme.experts else linear_tensors(scheme, 1, 1)
    if suffix not in unit:
        raise DamagedError(f"tensor {one_line(name)} is not part of a module stored as {scheme.label()}; {_FIX}")
    wanted = unit[suffix].dtype
    casts = tensor.dtype.is_floating_point and wanted.is_floating_point and suffix != "weight"
    if tensor.dtype != wanted and not (casts and tensor.dtype.itemsize > 1 and wanted.itemsize > 1):
        raise DamagedError(f"tensor {one_line(name)} is {tensor.dtype}, the format wants {wanted}; {_FIX}")


def check_range(name: str, suffix: str, scheme: Scheme, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise UnsupportedError, in one line, for scales that a float16 model makes infinite: kernels read those of
    integers, and of ARK's experts, in the dtype of the activations."""
    cast = cast_when_loaded(scheme, suffix) if scheme.experts else suffix == "scales"
    if not cast or dtype != torch.float16 or tensor.dtype not in (torch.float32, torch.bfloat16):
        return
    finite = tensor[tensor.isfinite()]
    if not finite.to(dtype).isfinite().all():
        raise UnsupportedError(
            f"{one_line(name)}: {finite.abs().max().item():.6g} is beyond float16, in which its kernel reads it; "
            "serve with --dtype bfloat16"
        )


def refuse_unasked(model: torch.nn.Module, config: XpuquantConfig) -> None:
    """Raise UnsupportedError, in one line, for a layer that the repo has quantized, and vLLM builds unquantized: a head
    without a quantization config, as Falcon-H1's, or a stack of experts that is asked for by a name nobody knows.
    (Linears go by their path: `by_path`.) And for one whose weight the model multiplies by itself, group by group, as
    DeepSeek-V4 does with `wo_a`."""
    ours = XpuquantLinearMethod | XpuquantMembersMethod | XpuquantExpertsMethod
    for path, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, LinearBase | RoutedExperts | ParallelLMHead):
            continue
        if isinstance(layer.quant_method, ours):
            if getattr(layer, "is_bmm", False):
                raise UnsupportedError(
                    f"{one_line(path)}: vLLM's {type(model).__name__} reads this layer's weight itself, "
                    "which is not done for stored layouts yet; serve the source repo instead"
                )
            continue
        # A stack of experts is a part of the module that has its name.
        paths = [path, path.rpartition(".")[0]] if isinstance(layer, RoutedExperts) else config.members(path)
        stored = next((config.names[name] for name in paths if name in config.names), None)
        if stored is not None:
            raise UnsupportedError(
                f"{one_line(stored)}: vLLM's {type(model).__name__} builds this layer so that it cannot be quantized; "
                "serve the source repo instead"
            )


def guard(model: Any, config: XpuquantConfig, dtype: torch.dtype) -> None:
    """Put an `Intake` before `model.load_weights`; only the first load must be complete."""
    inner: Callable[..., set[str] | None] = model.load_weights
    complete = False

    @wraps(inner)
    def load_weights(weights: Weights, *args: Any, **kwargs: Any) -> set[str] | None:
        nonlocal complete
        intake = Intake(model, config, dtype)
        with HostCopies():
            loaded = inner(intake.stream(weights), *args, **kwargs)
            settle(model)
        if not complete:
            intake.finish(loaded)
            complete = True
        return None if loaded is None else loaded | intake.filled

    model.load_weights = load_weights


def register() -> None:
    """Wrap `BaseModelLoader.create_model`, once."""
    inner = BaseModelLoader.create_model
    if hasattr(inner, "_xpuquant"):
        return

    @wraps(inner)
    def create_model(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        model: torch.nn.Module = inner(self, vllm_config, *args, **kwargs)
        if isinstance(vllm_config.quant_config, XpuquantConfig):
            go_by_path(model, vllm_config.quant_config)
            follow_or_refuse(model, vllm_config.quant_config.stored)
            refuse_unasked(model, vllm_config.quant_config)
            guard(model, vllm_config.quant_config, vllm_config.model_config.dtype)
        return model

    create_model._xpuquant = True  # type: ignore[attr-defined]
    BaseModelLoader.create_model = create_model
