"""Reader for NVFP4 experts that are one 3-D tensor per layer, as ModelOpt exports Llama 4's and gpt-oss's.

    P.gate_up_proj                 U8      [E, H/2, 2I]   two E2M1 codes to a byte along H, the even row low
    P.gate_up_proj_weight_scale    F8_E4M3 [E, H/16, 2I]
    P.gate_up_proj_weight_scale_2  F32     [], [1] or [E]  multiplies: of all experts, or of each
    P.gate_up_proj_input_scale     of W4A4: static scale of the activations, which stay in 16 bits on an XPU
    P.down_proj                    U8      [E, I/2, H]
    P.down_proj_...                likewise

ModelOpt quantizes the experts along their inputs and turns them back to the axes of the unquantized model, `[E, K, N]`
(modelopt/torch/export/unified_export_hf.py, `_export_quantized_weight`; quant_utils.py,
`maybe_transpose_expert_weight_dimensions`). Other writers leave them `[E, N, K/2]` (Motif 3). Shapes tell, as in
`fp8_fused.py`.
"""

from __future__ import annotations

from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Checkpoint
from xpuquant.formats.readers.base import STACKS, Parts, both_quantized, check_static, need
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import Weight
from xpuquant.formats.weights.floats import view
from xpuquant.formats.weights.nvfp4 import GROUP, Nvfp4Weight

_ENDS = ("_weight_scale", "_weight_scale_2", "_input_scale")


class Nvfp4Fused:
    name = "nvfp4"
    methods = frozenset({"modelopt", "modelopt-fp4", "modelopt-mixed", "nvfp4"})
    suffixes = frozenset(part + end for part in STACKS for end in ("", *_ENDS))

    def claims(self, parts: Parts) -> bool:
        return any(part in parts and parts[part].dtype == "U8" and f"{part}_weight_scale_2" in parts for part in STACKS)

    def read(self, checkpoint: Checkpoint, name: str, parts: Parts) -> list[Weight]:
        both_quantized(parts)
        stacks = [need(parts, part, name, dtype="U8", dims=3) for part in STACKS]
        transposed = _is_transposed(name, *stacks)
        return [
            weight
            for part, tensor in zip(STACKS, stacks, strict=True)
            for weight in self._experts(name, parts, part, tensor, transposed)
        ]

    def _experts(self, name: str, parts: Parts, part: str, codes: Tensor, transposed: bool) -> list[Weight]:
        scale = need(parts, f"{part}_weight_scale", name, dtype="F8_E4M3", dims=3)
        overall = need(parts, f"{part}_weight_scale_2", name, dtype="F32")
        static = [parts[f"{part}_input_scale"]] if f"{part}_input_scale" in parts else []
        for tensor in static:
            check_static(tensor)
        E, (N, half) = codes.shape[0], codes.shape[:0:-1] if transposed else codes.shape[1:]
        K = 2 * half
        grid = (K // GROUP, N) if transposed else (N, K // GROUP)
        if K % GROUP or scale.shape != (E, *grid):
            raise DamagedError(f"{scale.name} has shape {list(scale.shape)}; NVFP4 of {[N, K]} needs {[E, *grid]}")
        shared = overall.shape in ((), (1,))
        if not shared and overall.shape not in ((E,), (E, 1), (E, 1, 1)):
            raise DamagedError(
                f"{overall.name} has shape {list(overall.shape)}, want one number, or one of {E} experts"
            )
        facts = [f"fused NVFP4 experts, {'[E, K, N]' if transposed else '[E, N, K]'}, from the shapes"]
        if static:
            facts.append("activations stay in 16 bits, where the checkpoint quantizes them: their scales are dropped")
        return [
            Nvfp4Weight(
                name=f"{name}.{expert}.{part}",
                format=self.name,
                N=N,
                K=K,
                tensors=(codes, scale, overall, *static),
                facts=tuple(facts),
                element="e2m1",
                granularity="group",
                block=(1, GROUP),
                codes=view(codes, "U8", codes.shape[1:], expert),
                scale=view(scale, scale.dtype, grid, expert),
                transposed=transposed,
                stack=codes.name,
                global_scale=view(overall, "F32", (1,), 0 if shared else expert),
                divides=False,
            )
            for expert in range(E)
        ]


def _is_transposed(name: str, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the stacks are `[E, K/2, N]`: gate_up_proj has twice the I of down_proj, and they share H.

    Raises:
        DamagedError: shapes that fit neither way.
    """
    (E, a, b), (experts, c, d) = gate_up.shape, down.shape
    if experts == E and (a, c) == (4 * d, 2 * b):
        return False
    if experts == E and (b, d) == (4 * c, 2 * a):
        return True
    raise DamagedError(f"{name}: gate_up_proj {[E, a, b]} and down_proj {[experts, c, d]} do not belong together")
