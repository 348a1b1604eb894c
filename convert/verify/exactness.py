"""Exactness: every value of the output decodes to exactly what the source decodes to.

What flows: a worker takes a module, walks its matrices in blocks of rows that fit the cache, decodes the block from the
source and from the output to the common form of `weights/decoded.py`, by code that shares nothing with the conversion's
fast path, and compares integers and scale values for equality. The same pass counts what `health.py` warns of
and digests the decoded form, so that a later check needs no source. Unquantized tensors are compared byte by byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.survey import PlannedModule
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.converted import Repo
from xpuquant.conversion.sources.base import Source, read_slice
from xpuquant.conversion.verify.column_cache import Panels
from xpuquant.conversion.verify.digests import MatrixDigest, module_digest
from xpuquant.conversion.verify.health import Counter
from xpuquant.conversion.verify.verdict import CONTRADICTIONS, Checked, Health, contradiction
from xpuquant.errors import DamagedError
from xpuquant.formats.checkpoint import Array, Slice, as_bytes, whole
from xpuquant.formats.dtypes import numpy_dtype
from xpuquant.formats.layouts.base import Matrix, Stored
from xpuquant.formats.layouts.modules import ExpertStack
from xpuquant.formats.safetensors import Tensor
from xpuquant.formats.weights.base import PIECE_BYTES, ROWS_MULTIPLE, Weight, row_blocks
from xpuquant.formats.weights.decoded import Decoded, difference, in_order, to_bf16
from xpuquant.formats.weights.parts import BiasRows

BLOCK_CODES = 2 << 20
"""Codes decoded at once: a matrix of a small expert in one go, for every block costs the same few hundred microseconds
beside its bytes; both sides and their temporaries still stay in the third-level cache."""

Result = TypeVar("Result")


def check_exact(
    plan: Plan, source: Source, repo: Repo, jobs: int, progress: Progress
) -> tuple[list[Checked], dict[str, Health]]:
    """Compare everything the plan describes with everything the repo holds.

    Returns:
        The verdict on each module and unquantized tensor, with its digest; what was counted, per module.

    Raises:
        DamagedError: the repo's tensors are not those of the plan, by name, dtype or shape.
        EnvironmentFault: unreadable files.
    """
    _same_tensors(plan, repo)

    def module(planned: PlannedModule) -> tuple[Checked, Health | None]:
        return _check_module(planned, source, repo, plan.options.scale_dtype, progress)

    def passed(tensor: Tensor) -> tuple[Checked, Health | None]:
        return _check_bytes(source, tensor, repo, progress), None

    def bias(split: BiasRows, name: str) -> tuple[Checked, Health | None]:
        return _check_split_bias(split, source, repo.tensors[name], repo), None

    # Largest first, so that no worker is left with a long one at the end.
    largest = sorted(plan.modules, key=lambda planned: -planned.nbytes)
    calls = [partial(module, planned) for planned in largest] + [partial(passed, one) for one in plan.passed]
    calls += [partial(bias, split, name) for name, split in plan.split_biases.items()]
    results = run_all(jobs, calls)
    return [checked for checked, _ in results], {c.name: health for c, health in results if health is not None}


def run_all(jobs: int, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Results of the calls, in order, from `jobs` threads. The first error stops what has not begun."""
    # All of it is arithmetic: more threads than processors only take each other's caches.
    with ThreadPoolExecutor(min(jobs, len(os.sched_getaffinity(0))), "verify") as workers:
        running = [workers.submit(call) for call in calls]
        try:
            return [future.result() for future in running]
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise


def _same_tensors(plan: Plan, repo: Repo) -> None:
    wanted = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    for name in wanted.keys() - repo.tensors.keys():
        raise DamagedError(f"{name} is missing from the output")
    for name in repo.tensors.keys() - wanted.keys():
        raise DamagedError(f"{name} is in the output, but the source gives no such tensor")
    for name, tensor in wanted.items():
        held = repo.tensors[name]
        if (held.dtype, held.shape) != (tensor.dtype, tensor.shape):
            raise DamagedError(
                f"{name} is {held.dtype} {list(held.shape)}, the source gives {tensor.dtype} {list(tensor.shape)}"
            )


def _check_module(
    planned: PlannedModule, source: Source, repo: Repo, scale_dtype: str | None, progress: Progress
) -> tuple[Checked, Health | None]:
    name, weights, scheme = planned.conversion.name, planned.weights, planned.conversion.scheme
    share = planned.nbytes // max(len(weights), 1)

    def verdict(error: str | None, digest: str | None = None) -> Checked:
        return Checked(name, len(weights), error, digest)

    if scheme is None:
        rounded = [_check_rounded(weight, source, repo) for _, _, weight in weights]
        progress(planned.nbytes)
        return verdict(next((wrong for wrong in rounded if wrong is not None), None)), None
    # fp8 scales are float32 and MX scales exponents, whatever dtype was asked for.
    cast = numpy_dtype(scale_dtype) if scheme.scale_dtype == scale_dtype else None
    stored = repo.modules.get(name)
    if stored is None or stored.scheme != scheme:
        said = stored.scheme.label() if stored else "nothing"
        return verdict(f"config.json says {said}, the source gives {scheme.label()}"), None
    stored = replace(stored, load=Panels(stored.load))
    counter = Counter(scheme.symmetric)
    digests: list[MatrixDigest] = []
    try:
        matrices = matrices_by_role(repo, stored)
        for role, expert, weight in weights:
            digest = MatrixDigest(matrix := find_matrix(matrices, role, expert))
            wrong = _check_matrix(weight, source, repo, stored, matrix, cast, digest, counter)
            if wrong is not None:
                return verdict(wrong if weight.name == name else f"{weight.name}: {wrong}"), None
            digests.append(digest)
            progress(share)
        wrong = _check_biases(planned, source, stored) or _check_input_scale(planned, source, stored)
    except CONTRADICTIONS as fault:
        return verdict(contradiction(fault)), None
    return verdict(wrong, module_digest(stored, digests)), counter.health


Matrices = Mapping[tuple[str, int | None], Matrix]


def matrices_by_role(repo: Repo, stored: Stored) -> Matrices:
    """The matrices of a stored module by (role, expert). Raises DamagedError where the contract is broken."""
    return {(matrix.role, matrix.expert): matrix for matrix in repo.layout(stored).matrices(stored)}


def find_matrix(matrices: Matrices, role: str, expert: int | None) -> Matrix:
    """One matrix, or `gate_up` of a source that has both in one: the rows of gate and up as they are stored.

    Raises:
        DamagedError: the module has no such matrix.
    """
    fused = role == "gate_up"
    matrix = matrices.get(("gate" if fused else role, expert))
    if matrix is None:
        raise DamagedError(f"the output has no {role} matrix of expert {expert}")
    return Matrix(role, 2 * matrix.N, matrix.K, expert) if fused else matrix


def _check_matrix(
    weight: Weight,
    source: Source,
    repo: Repo,
    stored: Stored,
    matrix: Matrix,
    cast: object,
    digest: MatrixDigest,
    counter: Counter,
) -> str | None:
    layout = repo.layout(stored)
    if (matrix.N, matrix.K) != (weight.N, weight.K):
        return f"output is [{matrix.N}, {matrix.K}], source [{weight.N}, {weight.K}]"
    for start, stop, expected in decoded_blocks(weight, source):
        try:
            actual = in_rows(layout.decode(stored, matrix, start, stop))
        except CONTRADICTIONS as fault:
            return contradiction(fault)
        wrong = difference(in_rows(expected), actual, cast)
        if wrong is not None:
            return f"rows {start}:{stop}: {wrong}"
        digest.update(actual)
        counter.update(actual)
    return None


def in_rows(decoded: Decoded) -> Decoded:
    """The same with its codes contiguous: comparing, digesting and counting walk them row by row."""
    codes = decoded.codes
    return decoded if codes.flags.c_contiguous else replace(decoded, codes=in_order(codes))


def decoded_blocks(weight: Weight, source: Source) -> Iterator[tuple[int, int, Decoded]]:
    """The source's rows, decoded, block by block. Source slices are read in larger blocks than are decoded: strided
    reads want long runs, decoding wants the cache."""
    row_bytes = sum(part.nbytes for part in weight.decoded(0, weight.N).inputs) // weight.N
    for top, bottom in row_blocks(weight.N, row_bytes, ROWS_MULTIPLE, PIECE_BYTES):
        outer = weight.decoded(top, bottom).inputs
        arrays = [read_slice(source, part) for part in outer]
        for start, stop in row_blocks(bottom - top, weight.K, ROWS_MULTIPLE, BLOCK_CODES):
            recipe = weight.decoded(top + start, top + stop)
            narrowed = [part.inside(of, array) for part, of, array in zip(recipe.inputs, outer, arrays, strict=True)]
            yield top + start, top + stop, recipe.build(narrowed)


def _check_rounded(weight: Weight, source: Source, repo: Repo) -> str | None:
    """A dequantized matrix: bf16 values are the exact ones, rounded once."""
    tensor = repo.tensors[f"{weight.name}.weight"]
    for start, stop, decoded in decoded_blocks(weight, source):
        expected = to_bf16(decoded.values())
        actual = repo.reader.read(Slice(tensor, start, stop))
        if not np.array_equal(expected.view(np.uint16), actual.view(np.uint16)):
            return f"{weight.name}, rows {start}:{stop}: not the source's values rounded to bf16"
    return None


def _check_biases(planned: PlannedModule, source: Source, stored: Stored) -> str | None:
    """Stacked expert biases: the same values in the rows of their matrices."""
    stack = planned.source
    if not isinstance(stack, ExpertStack) or not stack.biases:
        return None
    upper, down = stored.array("gate_up_proj_bias"), stored.array("down_proj_bias")
    half = upper.shape[1] // 2
    # Halves that were joined to one matrix have two biases, in the order of its rows.
    alternate = stack.interleaved and "gate" in stack.weights
    rows = {
        "gate_up": upper,
        "down": down,
        "gate": upper[:, 0::2] if alternate else upper[:, :half],
        "up": upper[:, 1::2] if alternate else upper[:, half:],
    }
    for role, slices in stack.biases.items():
        for expert, part in enumerate(slices):
            if not np.array_equal(read_slice(source, part).reshape(-1), rows[role][expert], equal_nan=True):
                return f"{part.tensor.name} differs (bias of {role}, expert {expert})"
    return None


def _check_input_scale(planned: PlannedModule, source: Source, stored: Stored) -> str | None:
    """A static activation scale: the same value, widened to float32."""
    if not stored.scheme.input_scale:
        return None
    held = stored.array("input_scale").reshape(-1)
    for _, _, weight in planned.weights:
        tensor = getattr(weight, "input_scale", None)
        if tensor is None:
            return f"{weight.name}.input_scale: the source has none"
        expected = read_slice(source, whole(tensor)).reshape(-1)
        if not np.array_equal(expected.astype(np.float32), held, equal_nan=True):
            return f"{weight.name}.input_scale is {held[0]!r}, source has {expected[0]!r}"
    return None


def _check_bytes(source: Source, tensor: Tensor, repo: Repo, progress: Progress) -> Checked:
    """An unquantized tensor: the same bytes, and their sha256."""
    digest = hashlib.sha256()
    for start, stop in byte_blocks(tensor):
        before = read_slice(source, Slice(as_bytes(tensor), start, stop))
        after = read_bytes(repo, repo.tensors[tensor.name], start, stop)
        if not np.array_equal(before, after):
            return Checked(tensor.name, 0, "bytes differ from the source's")
        digest.update(after.data)
        progress(after.size)
    return Checked(tensor.name, 0, None, digest.hexdigest())


def _check_split_bias(split: BiasRows, source: Source, held: Tensor, repo: Repo) -> Checked:
    """A bias out of a stacked or fused one: the same values, and the sha256 of its bytes."""
    actual = repo.reader.read(whole(held))
    expected = split.values().build([read_slice(source, part) for part in split.parts])
    if not np.array_equal(expected, actual, equal_nan=True):
        return Checked(held.name, 0, "differs from its rows of the source's")
    return Checked(held.name, 0, None, hashlib.sha256(actual.view(np.uint8).data).hexdigest())


def byte_blocks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Bytes of a tensor, a few megabytes at a time."""
    return row_blocks(tensor.nbytes, 1, limit=4 << 20)


def read_bytes(repo: Repo, tensor: Tensor, start: int, stop: int) -> Array:
    """Bytes `start:stop` of one of the repo's tensors."""
    return repo.reader.read(Slice(as_bytes(tensor), start, stop))
