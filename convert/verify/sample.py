"""Is this folder the conversion of that source? A few rows of every module, compared: less than a proof, which is
`verify`, and enough to know another model, whatever its name and size."""

from __future__ import annotations

from pathlib import Path

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.repo.converted import open_repo
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.verify.exactness import find_matrix, matrices_by_role
from xpuquant.conversion.verify.rounding import round_scales
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, contradiction
from xpuquant.errors import UsageError
from xpuquant.formats.checkpoint import Slice, as_bytes
from xpuquant.formats.weights.decoded import difference

_ROWS = 8
_PLAIN_BYTES = 4096


def sampled_difference(out: Path, plan: Plan, source: Source) -> str | None:
    """Where a finished folder is not the conversion of a source, as far as a sample shows; None where it is.

    Args:
        plan: of the source, with the options that the folder was converted with.
        source: in a folder here: of one on the Hub the commit says more.
    """
    try:
        repo = open_repo(out)
    except (UsageError, *CONTRADICTIONS) as error:
        return str(error)
    try:
        for planned in plan.modules:
            conversion = planned.conversion
            if conversion.scheme is None:
                continue
            stored = repo.modules.get(conversion.name)
            if stored is None or stored.scheme != conversion.scheme:
                return f"{conversion.name} is not stored so"
            role, expert, weight = planned.weights[0]
            recipe = weight.decoded(0, min(_ROWS, weight.N))
            expected = recipe.build([read_slice(source, part) for part in recipe.inputs])
            if conversion.rounded is not None:
                expected = round_scales(expected, conversion.rounded)
            matrix = find_matrix(matrices_by_role(repo, stored), role, expert)
            held = repo.layout(stored).decode(stored, matrix, 0, min(_ROWS, weight.N))
            if differs := difference(expected, held):
                return f"{conversion.name}: {differs}"
        for tensor in plan.passed:
            there = repo.tensors.get(tensor.name)
            if there is None or there.nbytes != tensor.nbytes:
                return f"{tensor.name} is not there"
            end = min(_PLAIN_BYTES, tensor.nbytes)
            ours = read_slice(source, Slice(as_bytes(tensor), 0, end))
            if ours.tobytes() != repo.read(Slice(as_bytes(there), 0, end)).tobytes():
                return f"{tensor.name} has other values"
    except CONTRADICTIONS as error:
        return contradiction(error)
    finally:
        repo.reader.close()
    return None
