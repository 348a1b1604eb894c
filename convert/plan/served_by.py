"""What serves a converted model: the kernel of each module, the releases that have it, the engines that load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from xpuquant.ark_releases import ARK_PACKAGE, serving_ark
from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.scheme import ARK_LAYOUTS, Scheme
from xpuquant.served_families import Tried, tried
from xpuquant.xpu_releases import TOP_K, operators_of, served, since


def kernel_and_releases(name: str, scheme: Scheme | None, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """(the XPU kernel that reads the stored module `name`, the releases that have it); see `ModuleOutcome`.
    None of what is not quantized, or is not for XPU kernels.

    Args:
        config: the model's config.json.
    """
    if scheme is None:
        return None, None
    kernel = layouts_by_name()[scheme.layout].kernel_of(scheme, name)
    if not operators_of(scheme):
        return kernel, None
    top_k = _experts_per_token(config)
    oldest = since(scheme, top_k)
    if oldest is None:
        return kernel, f"none gathers {top_k} experts per token"
    if scheme.experts and (activation := _activation(config)) not in (*_COMPUTED[scheme.gated], None):
        return kernel, f"none computes '{activation}' experts{'' if scheme.gated else ' without a gate'}"
    newest = ".".join(str(part) for part in served()[-1].number[:3])
    beside = f", {ARK_PACKAGE} {serving_ark()}" if scheme.layout in ARK_LAYOUTS else ""
    return kernel, f"{oldest} to {newest}.x{beside}"


def engines_of(modules: Iterable[PlannedModule], options: Options, checkpoint: Checkpoint) -> tuple[Tried, ...]:
    """What versions of engines are known to do with the converted model; nothing where it is not for this loader."""
    schemes = {m.conversion.name: scheme for m in modules if (scheme := m.conversion.scheme) is not None}
    if not schemes or options.layout != "xpu":
        return ()
    parts = {"experts" if scheme.experts else "linears" for scheme in schemes.values()}
    linears = [name for name, scheme in schemes.items() if not scheme.experts]
    return tried(checkpoint.config, parts, {scheme.layout for scheme in schemes.values()}, linears)


_COMPUTED = {
    True: ("silu", "gelu", "gelu_tanh", "gelu_pytorch_tanh", "swigluoai"),
    False: ("relu2", "relu2_no_mul"),
}
"""Whether experts have a gate → activations, in the words of config.json, that vLLM hands over as one that a release
computes (`xpu_releases.refusal_of_experts`)."""


def _activation(config: Mapping[str, Any]) -> str | None:
    """As config.json says, or its part for the language model; None where neither does."""
    text = config.get("text_config")
    for part in (text if isinstance(text, Mapping) else {}, config):
        for key in ("mlp_hidden_act", "hidden_act", "hidden_activation"):
            if isinstance(part.get(key), str):
                return str(part[key])
    return None


def engine_versions() -> dict[str, str]:
    """Engine → the versions of it that the plugins are for, `vllm>=0.32,<0.34`: as the extras ask for them."""
    # Where it is asked for: importing it takes a twelfth of the time to the first byte.
    from importlib import metadata

    wanted, found = metadata.requires("xpuquant") or [], {}
    for name in ("vllm", "transformers"):
        line = next((line for line in wanted if line.startswith(name) and f'extra == "{name}"' in line), name)
        bounds = line.partition(";")[0].strip().removeprefix(name).split(",")
        found[name] = name + ",".join(sorted(bounds, reverse=True))
    return found


def _experts_per_token(config: Mapping[str, Any]) -> int | None:
    """As config.json says, or its part for the language model; None where neither does."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, Mapping) else {}):
        for key in TOP_K:
            if type(part.get(key)) is int:
                number: int = part[key]
                return number
    return None
