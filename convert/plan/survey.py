"""What every module of a source would become, and why some would not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from xpuquant.conversion.options import Options
from xpuquant.conversion.sizes import counted
from xpuquant.errors import Argument, UnsupportedError
from xpuquant.formats.architecture import expert_of
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.layouts import layouts_by_name
from xpuquant.formats.layouts.base import Conversion, Refusal
from xpuquant.formats.layouts.compressed_tensors.config import FAMILY
from xpuquant.formats.layouts.dequantized import can_dequantize, convert_to_bf16
from xpuquant.formats.layouts.modules import ExpertStack, LooseExperts, Module, gather_modules
from xpuquant.formats.layouts.plane_fillers import overflow_of
from xpuquant.formats.readers.fold_act_order import fold_act_orders
from xpuquant.formats.readers.reading import Reading, read
from xpuquant.formats.safetensors import collector_paused
from xpuquant.formats.scheme import compact
from xpuquant.formats.weights.base import Weight
from xpuquant.values import frozen


@frozen
class PlannedModule:
    """A quantized module of the source and what becomes of it."""

    source: Module
    conversion: Conversion

    @property
    def weights(self) -> list[tuple[str, int | None, Weight]]:
        """(role, expert, weight) of every matrix."""
        return list(self.source.matrices())

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.conversion.tensors)


@frozen
class Survey:
    """What every module of a source would become.

    refused        module → reason, for those that have no form
    dequantizable  all of the refused can be stored as bf16
    """

    planned: list[PlannedModule]
    refused: Mapping[str, str]
    reading: Reading
    dequantizable: bool


@collector_paused()
def survey_modules(checkpoint: Checkpoint, options: Options) -> Survey:
    """What every module would become."""
    reading = read(checkpoint)
    planned: list[PlannedModule] = []
    refused = dict(reading.refused)
    dequantizable = not refused
    # Siblings of an expert that cannot be read are refused with it, not reported as an incomplete stack.
    stacks = {expert[0] for name in refused if (expert := expert_of(name)) is not None}
    weights: Sequence[Weight] = reading.weights
    if stacks:
        weights = [w for w in weights if (expert := expert_of(w.name)) is None or expert[0] not in stacks]
    if options.fold_act_order:
        weights = fold_act_orders(checkpoint, weights)
    for module in _gathered(checkpoint, weights, options):
        offer = _offer(module, options)
        if isinstance(offer, Conversion) and (reason := overflow_of(offer.tensors, checkpoint.peek)) is not None:
            offer = Refusal(f"{reason} (bfloat16 and float32 hold it: scale_dtype)")
        if isinstance(offer, Conversion):
            planned.append(PlannedModule(module, offer))
        elif options.on_unsupported == "dequantize":
            planned.append(PlannedModule(module, convert_to_bf16(module, offer.reason)))
        else:
            refused[module.name] = offer.reason
            dequantizable = dequantizable and can_dequantize(module)
    return Survey(planned, refused, reading, dequantizable)


def _gathered(checkpoint: Checkpoint, weights: Sequence[Weight], options: Options) -> list[Module]:
    if options.layout != FAMILY:
        return gather_modules(checkpoint, weights)
    # Of the family that few conversions write.
    from xpuquant.formats.layouts.compressed_tensors.modules import gather_linears

    return gather_linears(checkpoint, weights)


def _offer(module: Module, options: Options) -> Conversion | Refusal:
    """The first layout that takes the module, in the order in which they are listed; else the first one's reason."""
    if isinstance(module, LooseExperts):
        return Refusal(module.reason)
    refusal: Refusal | None = None
    for layout in layouts_by_name(options.layout).values():
        offer = layout.offer(module, options.scale_dtype)
        if isinstance(offer, Conversion):
            return offer
        refusal = refusal or offer
    without = "compressed-tensors layout" if options.layout == FAMILY else "XPU kernel"
    return refusal or Refusal(f"{kind_of(module)} has no {without}")


def refusal(refused: Mapping[str, str], dequantizable: bool, layout: str) -> UnsupportedError:
    """The error for modules that cannot be converted: reasons, with the modules of each as compact patterns.

    Args:
        refused: module → reason.
        dequantizable: all of them can be stored as bf16.
        layout: the family asked for.
    """
    shown = "XPU" if layout == "xpu" else layout
    by_reason: dict[str, list[str]] = {}
    for name, reason in refused.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(f"{reason}: {', '.join(compact(names))}" for reason, names in by_reason.items())
    fix = [". ", Argument("on_unsupported", "dequantize"), " stores them as bf16"] if dequantizable else []
    return UnsupportedError(f"{modules_have(len(refused))} no exact {shown} layout: {listed}", *fix)


def modules_have(count: int) -> str:
    """`1 module has`, `2 modules have`: the beginning of a sentence."""
    return counted(count, "module has", "modules have")


def kind_of(module: Module) -> str:
    """What a module's weights are, for tables and refusals."""
    kinds = dict.fromkeys(weight.kind for _, _, weight in module.matrices())
    return " + ".join(kinds) + (" experts" if isinstance(module, ExpertStack) else "")
