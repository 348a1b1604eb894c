"""`explain SRC MODULE`: a module of a checkpoint, its tensors, what was decided from them, what it becomes and why.

Of a converted repo: what it is stored as, from which tensors, and what was decided from them then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.survey import survey_modules
from xpuquant.conversion.repo.description import StoredModule, stored_modules_of
from xpuquant.conversion.results import ModuleOutcome, TensorInfo, module_outcomes
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.open import open_source
from xpuquant.errors import UsageError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.values import frozen


@frozen(sealed=True)
class Explanation:
    """One module.

    name     of the module in the output; a stack of experts is one module
    tensors  of the source that it is made of
    outcome  what becomes of it; None where it is refused
    written  tensors that it is stored in; none where it is refused
    refused  why it has no exact layout; None where it has one
    """

    name: str
    tensors: tuple[TensorInfo, ...]
    outcome: ModuleOutcome | None
    written: tuple[TensorInfo, ...]
    refused: str | None


def look_into(name: str, revision: str | None, module: str, options: Options) -> Explanation | StoredModule:
    """Open what the user named and explain a module of it: of a checkpoint, or of a repo that was converted from one.

    Raises: as `open_source`, `described` and `explain_module`.
    """
    source = open_source(name, revision)
    stored = stored_modules_of(source)
    return explain_module(source, module, options) if stored is None else _stored(stored, module, source.checkpoint)


def _stored(modules: Mapping[str, StoredModule], asked: str, checkpoint: Checkpoint) -> StoredModule:
    tensors = {name: [*one.source_tensors, *(t.name for t in one.stored)] for name, one in modules.items()}
    return modules[_meant(asked, tensors, (), checkpoint)]


def explain_module(source: Source, module: str, options: Options) -> Explanation:
    """Explain a module.

    Args:
        module: its name, or that of a tensor or an expert of it.

    Raises:
        UsageError: no quantized module is called so. Otherwise as `inspect_source`.
    """
    survey = survey_modules(source.checkpoint, options)
    made_of = {
        planned.conversion.name: [tensor.name for _, _, weight in planned.weights for tensor in weight.tensors]
        for planned in survey.planned
    }
    name = _meant(module, made_of, survey.refused, source.checkpoint)
    if name in survey.refused:
        below = [tensor for tensor in source.checkpoint.tensors if tensor.startswith(f"{name}.")]
        return Explanation(name, _tensors(source.checkpoint, below), None, (), survey.refused[name])
    planned = next(planned for planned in survey.planned if planned.conversion.name == name)
    written = [TensorInfo(t.name, t.dtype, tuple(t.shape), t.nbytes) for t in planned.conversion.tensors]
    (outcome,) = module_outcomes([planned], source.checkpoint.config)
    return Explanation(name, _tensors(source.checkpoint, made_of[name]), outcome, tuple(written), None)


def _tensors(checkpoint: Checkpoint, names: list[str]) -> tuple[TensorInfo, ...]:
    found = [checkpoint.tensors[name] for name in dict.fromkeys(names)]
    return tuple(TensorInfo(t.name, t.dtype, t.shape, t.nbytes) for t in found)


def _meant(asked: str, made_of: Mapping[str, list[str]], refused: Collection[str], checkpoint: Checkpoint) -> str:
    """The module that a name stands for: its own, or that of one of its tensors or experts."""
    names = [*made_of, *refused]
    if asked in names:
        return asked
    for name, tensors in made_of.items():
        if any(tensor == asked or tensor.startswith(f"{asked}.") for tensor in tensors):
            return name
    for name in refused:
        if asked.startswith(f"{name}."):
            return name
    if asked in checkpoint.tensors or any(tensor.startswith(f"{asked}.") for tensor in checkpoint.tensors):
        raise UsageError(f"{asked} is not quantized: it stays as it is, byte for byte")
    close = get_close_matches(asked, names, n=1)
    raise UsageError(f"no module is called {asked}" + (f"; did you mean {close[0]}?" if close else ""))
