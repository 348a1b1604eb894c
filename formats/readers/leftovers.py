"""What lies beside the tensors that readers have used: passed on, dropped with a note, or the reason for a refusal.

A module is a closed world. Whatever stands below the name of a quantized module and was used by no reader changes what
the module computes, as far as anyone can tell: `pre_quant_scale` of ModelOpt's AWQ, `proj_down` of SVDQuant, the
matrix of an online rotation, the next one. It is a refusal that names it, unless it is known to change nothing here:

    bias                                    an ordinary tensor of the layer
    k_scale, v_scale, ...                   scales of the KV cache, which engines take from the file
    input_scale, activation_scale, ...      static scales of activations, one number each, where kernels quantize none
                                            or per token; one for each column would be a factor of its own
    weight beside qweight                   what the codes were made from; engines read the codes

The same holds for what wraps one: AutoRound's SVDQuant has `q_proj.residual_linear`, quantized, beside `q_proj.smooth`,
`q_proj.lora_down` and `q_proj.lora_up`.

Outside quantized modules, everything passes byte for byte but what is plainly packed, or a factor by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from xpuquant.formats.architecture import is_known, layer_of
from xpuquant.formats.readers.base import STACKS, Parts
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight

PLAIN = frozenset({"F16", "BF16", "F32", "F64"})

_KV_CACHE = re.compile(r"(?:[kvqp]|kv|prob)_(?:scale(?:_inv)?|zero_point)")
_KV_LAYERS = ("k_proj", "v_proj", "q_proj", "qkv_proj", "kv_b_proj", "k_b_proj", "v_b_proj", "query_key_value")
_OF_OUTPUTS = ("output_scale", "output_zero_point")

ACTIVATION_ENDS = (
    "input_scale",
    "input_zero_point",
    "input_global_scale",
    "input_scale_ub",
    "activation_scale",
    "act_scale",
    "input_scale_inv",
    *_OF_OUTPUTS,
)
"""Ends of static scales of activations. A layer that is not quantized does not quantize its activations either."""

_NOTHING = (*ACTIVATION_ENDS, "weight_shape")
_BIASES = ("bias", *(f"{part}_bias" for part in STACKS))

_FACTOR_ENDS = re.compile(r"(?:.*[._])?(?:pre_quant_scale|act\.scales|act_scales?|had_(?:k|matrix|rem_dim))", re.I)
_FACTOR_WORDS = frozenset(
    {
        *("smooth", "smoothing", "smoothquant", "rotate", "rotation", "rotations", "rot", "had", "hadamard"),
        *("spinquant", "quarot", "flatquant"),
    }
)
_NUMBERED_ROTATION = re.compile(r"(?:.*[._])?R[1-4](?:[._].*)?")
"""SpinQuant's names of its four rotations."""

_NO_FACTORS = frozenset({"inv_freq", "bias", "running_mean", "running_var", "num_batches_tracked"})

_LORA = re.compile(r"(?:.*\.)?lora_(?:embedding_)?[AB](?:\..*)?")
_WITH_LORA = ("phi4",)
"""Beginnings of model_types whose architecture has LoRA matrices (Phi-4-multimodal: one set for each kind of input)."""

_PACKED = frozenset({"I8", "U8", "I16", "U16", "U32"})
_TABLES = re.compile(r"(?:.*[._])?(?:bias|masked_bias|\w*mask\w*|\w*_ids?|\w*ind(?:ex|ices)\w*|\w*table\w*|\w*2eid)")
"""Integer tensors that models have: masks, positions, routing tables."""

_SCALING = re.compile(
    r"(?:[Ww]?scales?|s|[sS][uUvV]h?|(?:\w+_)?scales?(?:_\w+)?|zeros?|\w*zero_points?|qzeros|absmax|codebooks?|workspace)"
)


class Sorted:
    """Tensors that belong to no weight, sorted out.

    passed    written as they are, in file order
    refused   module → reason
    notes     what was dropped
    """

    def __init__(self) -> None:
        self.passed: list[Tensor] = []
        self.refused: dict[str, str] = {}
        self.notes: list[str] = []


def is_plain(parts: Parts) -> bool:
    """Whether a module is a float weight with static scales of activations left over beside it, or those scales alone
    (of a head that is tied to the embeddings, which producers save without its weight)."""
    experts = next((parts[stack].shape[0] for stack in STACKS if stack in parts and parts[stack].shape), 1)
    left = {suffix: tensor for suffix, tensor in parts.items() if not _means_nothing(suffix, tensor, experts)}
    if not left:
        return not any(suffix in _OF_OUTPUTS for suffix in parts)
    named = {"weight", *STACKS, *_BIASES}
    return left.keys() <= named and all(tensor.dtype in PLAIN for tensor in left.values())


def sort_leftovers(
    model_type: str, rest: Iterable[Tensor], quantized: Mapping[str, Sequence[Weight]], refused: Mapping[str, str]
) -> Sorted:
    """What becomes of tensors that no weight has used.

    Args:
        model_type: as config.json says.
        rest: those tensors, in file order.
        quantized: module → the weights that its reader made of it.
        refused: modules that are refused already: what is below them needs no word.
    """
    found = Sorted()
    dropped: dict[str, list[str]] = {}
    stacks = {name for name, weights in quantized.items() if [w for w in weights if w.name != name]}
    wrapped = {name.rpartition(".")[0]: name for name in quantized if name not in stacks and _is_wrapped(name)}
    beside: dict[str, list[Tensor]] = {}
    for tensor in rest:
        owner = _owner(tensor.name, quantized, stacks, refused)
        if owner is not None:
            if owner in refused or _passes(owner, tensor.name[len(owner) + 1 :]):
                found.passed.append(tensor)
            elif (why := _droppable(tensor, tensor.name[len(owner) + 1 :], quantized[owner])) is not None:
                dropped.setdefault(why, []).append(tensor.name)
            else:
                found.refused.setdefault(owner, _unread(owner, tensor))
            continue
        wrapper = next((above for above in _above(tensor.name) if above in wrapped), None)
        if wrapper is not None and not _is_expected(tensor.name[len(wrapper) + 1 :], model_type):
            inner = wrapped[wrapper]
            found.refused.setdefault(inner, _unread(wrapper, tensor))
            continue
        if tensor.name.rpartition(".")[2].endswith(_NOTHING):
            beside.setdefault(tensor.name.rpartition(".")[0], []).append(tensor)
        found.passed.append(tensor)
    _check_unquantized(model_type, found, dropped, beside, refused)
    for why, names in dropped.items():
        also = f" and {len(names) - 1} more" if names[1:] else ""
        found.notes.append(f"{names[0]}{also}: dropped; {why}")
    return found


def _is_wrapped(name: str) -> bool:
    """Whether a module is the part of a layer that holds its weight, beside other parts."""
    parent, _, leaf = name.rpartition(".")
    return not is_known(leaf) and not leaf.isdigit() and is_known(parent) and not layer_of(parent).embedding


def _is_expected(suffix: str, model_type: str) -> bool:
    return suffix in _BIASES or (_LORA.fullmatch(suffix) is not None and model_type.startswith(_WITH_LORA))


def _means_nothing(suffix: str, tensor: Tensor, experts: int) -> bool:
    """Whether a tensor is a static scale of activations (of a layer, or of each of its experts), or a shape."""
    if suffix == "weight_shape":
        return True
    return suffix.endswith(ACTIVATION_ENDS) and math.prod(tensor.shape) in (1, experts)


def _above(name: str) -> Iterator[str]:
    """The modules that a tensor stands in, the nearest first."""
    while name := name.rpartition(".")[0]:
        yield name


def _owner(
    name: str, quantized: Mapping[str, Sequence[Weight]], stacks: set[str], refused: Mapping[str, str]
) -> str | None:
    """The quantized module that a tensor stands in: its parent, or any module above it that is one linear."""
    parent = name.rpartition(".")[0]
    for owner in _above(name):
        if owner in refused or (owner in quantized and (owner == parent or owner not in stacks)):
            return owner
    return None


def _passes(owner: str, suffix: str) -> bool:
    return (
        suffix in _BIASES
        or _KV_CACHE.fullmatch(suffix) is not None
        or (suffix in _OF_OUTPUTS and owner.endswith(_KV_LAYERS))
    )


def _droppable(tensor: Tensor, suffix: str, weights: Sequence[Weight]) -> str | None:
    if "." not in suffix and _means_nothing(suffix, tensor, len(weights)) and suffix != "weight_shape":
        return "static scales of activations, which kernels here quantize per token or not at all"
    if suffix == "weight_shape":
        return "the shapes of the tensors say it"
    shape = (weights[0].N, weights[0].K)
    if suffix == "weight" and tensor.dtype in PLAIN and tensor.shape in (shape, shape[::-1]):
        return "an unquantized copy beside the codes, which loaders do not read"
    return None


def _unread(owner: str, tensor: Tensor) -> str:
    suffix = tensor.name[len(owner) + 1 :]
    shown = f"{suffix} {tensor.dtype} {list(tensor.shape)}"
    if _is_factor(suffix):
        return f"its input is multiplied by {shown} at run time, which no kernel here does"
    return f"{shown} beside its weight is read by no format here: it may change what the module computes"


def unknown_beside(name: str, parts: Parts, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """A tensor of a module that its reader has not been shown, because no format has its name."""
    for tensor in tensors.values():
        owner, _, suffix = tensor.name.rpartition(".")
        if owner == name and suffix not in parts and not _passes(name, suffix):
            return tensor
    return None


def _check_unquantized(
    model_type: str,
    found: Sorted,
    dropped: dict[str, list[str]],
    beside: Mapping[str, Sequence[Tensor]],
    refused: Mapping[str, str],
) -> None:
    """Drop what is left over beside float weights, and refuse what is no plain tensor of a model."""
    siblings: dict[str, dict[str, Tensor]] = {}
    for tensor in found.passed:
        prefix, _, suffix = tensor.name.rpartition(".")
        siblings.setdefault(prefix, {})[suffix] = tensor
    gone: set[str] = set()
    for prefix, tensors in beside.items():
        if prefix not in refused and is_plain(siblings[prefix]):
            has_weight = any(not tensor.name.endswith(_NOTHING) for tensor in siblings[prefix].values())
            why = "left over " + ("beside a weight that is not quantized" if has_weight else "where there is no weight")
            dropped.setdefault(why, []).extend(tensor.name for tensor in tensors)
            gone |= {tensor.name for tensor in tensors}
    for tensor in found.passed:
        prefix = tensor.name.rpartition(".")[0]
        if prefix in refused or tensor.name in gone:
            continue
        if _is_factor(tensor.name) and _may_be_factor(tensor):
            found.refused.setdefault(prefix, factor_reason(tensor))
        elif _LORA.fullmatch(tensor.name) and not model_type.startswith(_WITH_LORA):
            found.refused.setdefault(prefix, "a LoRA adapter inside the checkpoint; merge it into the weights first")
        elif _is_packed(tensor, siblings[prefix]):
            shown = f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
            found.refused.setdefault(prefix, f"no known format has these tensors: {shown}")
    found.passed = [tensor for tensor in found.passed if tensor.name not in gone]


def factor_reason(tensor: Tensor) -> str:
    """Why a model with this factor of activations is refused."""
    shown = f"{tensor.name} {tensor.dtype} {list(tensor.shape)}"
    if tensor.name.endswith("act.scales"):
        return f"the activation is divided by {shown} at run time (AutoAWQ's ScaledActivation), which no loader does"
    return f"activations are multiplied by {shown} at run time, which no kernel here does"


def _is_factor(name: str) -> bool:
    """Whether a tensor is a factor of activations by its name, wherever it stands."""
    last = ".".join(name.rsplit(".", 2)[-2:])
    words = set(re.split(r"[._]", last.lower()))
    return bool(words & _FACTOR_WORDS or _FACTOR_ENDS.fullmatch(name) or _NUMBERED_ROTATION.fullmatch(last))


def _may_be_factor(tensor: Tensor) -> bool:
    """Whether a tensor of such a name can be a factor of activations: not the frequencies of rotary embeddings
    (`rot_emb.inv_freq`), nor a convolution (`smooth_convs.0.weight` of a feature pyramid) or its bias."""
    suffix = tensor.name.rpartition(".")[2]
    return len(tensor.shape) <= 2 and suffix not in _NO_FACTORS


def _is_packed(tensor: Tensor, siblings: Parts) -> bool:
    """Whether an unused tensor is somebody's quantized weight: of a dtype that models do not have, or integers beside
    scales."""
    own = tensor.name.rpartition(".")[2]
    if len(tensor.shape) < 2 or tensor.dtype in PLAIN or own in _BIASES:
        return False
    if tensor.dtype[0] == "F":
        return True
    if _TABLES.fullmatch(own):
        return False
    if any(f"{own}{end}" in siblings for end in ("_scale", "_scales", "_scale_inv")):
        return True
    scaled = any(_SCALING.fullmatch(suffix) for suffix in siblings)
    floats = any(other.dtype in PLAIN for suffix, other in siblings.items() if suffix not in _BIASES)
    # Models have tables of wide integers beside floats (coordinates of patches, of neighbours), but not in linears.
    linear = floats and any(map(is_known, _above(tensor.name)))
    integers = tensor.dtype in ("I32", "I64") and "weight" not in siblings
    return tensor.dtype in _PACKED or (integers and (scaled or linear))
