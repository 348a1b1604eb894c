"""The Python API: what the command line does, as functions. `import xpuquant` gives all of it.

    import xpuquant

    result = xpuquant.convert("org/model-GPTQ", "model-xpu")
    for module in result.plan.modules:
        print(module.name, module.source, "→", module.scheme)
    assert xpuquant.verify("model-xpu").passed
    xpuquant.push("model-xpu", "me/model-xpu")

Results are frozen dataclasses. Errors are those of `xpuquant.errors`: a message is one line that names the fix. An
argument that is not what its function takes is a `UsageError`, before anything is read or written.

A function that takes `progress` calls it with the name of a phase (`download`, `convert`, `verify`, `push`, `compare`,
`decode`, `stream`), the bytes done and the bytes in all. One thread at a time calls it. Within a phase the bytes never
fall, and a phase that ends well ends with all of them. An exception that it raises stops the work.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from xpuquant.arguments import public
from xpuquant.conversion.decoded_diff import ModuleValues
from xpuquant.conversion.diff import Difference, compare
from xpuquant.conversion.doctor import BackendHealth, Diagnosis, examine
from xpuquant.conversion.explanation import Explanation, look_into
from xpuquant.conversion.hub import publish
from xpuquant.conversion.hub.destination import Destination
from xpuquant.conversion.hub.publish import Pushed
from xpuquant.conversion.inspection import CONTEXT, RANKS, Inspection, look_at
from xpuquant.conversion.options import Options
from xpuquant.conversion.progress import Calls, ProgressCallback, Reporter, Silent
from xpuquant.conversion.repo.description import ConvertedRepo, StoredModule
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.repo.source_card import CardFields
from xpuquant.conversion.results import Converted, ModuleOutcome, PartConverted, Planned
from xpuquant.conversion.runs import request as runs
from xpuquant.conversion.runs.checking import verify_folder
from xpuquant.conversion.runs.parts import parse_part
from xpuquant.conversion.verify.verdict import Verdict
from xpuquant.errors import UsageError

__all__ = [
    "BackendHealth",
    "Converted",
    "ConvertedRepo",
    "Diagnosis",
    "Difference",
    "Explanation",
    "Finished",
    "Inspection",
    "ModuleOutcome",
    "ModuleValues",
    "Options",
    "PartConverted",
    "Planned",
    "Pushed",
    "StoredModule",
    "Verdict",
    "convert",
    "convert_part",
    "diff",
    "doctor",
    "explain",
    "finish",
    "inspect",
    "plan",
    "push",
    "verify",
]

StrPath = str | os.PathLike[str]


@public
def inspect(
    source: StrPath,
    *,
    on_unsupported: str = "refuse",
    tensor_parallel: Sequence[int] = RANKS,
    context: int = CONTEXT,
    revision: str | None = None,
) -> Inspection | ConvertedRepo:
    """What a checkpoint is and what would become of it, from headers alone. Nothing is written.

    Args:
        source: folder with a quantized checkpoint or with a repo that was converted, or `owner/name` of one on the Hub.
        on_unsupported: what to do with modules that no kernel takes: `refuse`, or `dequantize` them to bf16.
        tensor_parallel: numbers of GPUs to split the model over.
        context: tokens of the sequence whose KV cache is counted.
        revision: branch, tag or commit of a source on the Hub.

    Returns:
        What would become of it; of a converted repo, what it is, from what, verified how and what serves it.
        `isinstance` tells which; `modules` of either are as they are stored when converted.

    Raises:
        UsageError: not a quantized checkpoint. DamagedError: not a sound one. EnvironmentFault: disk, network.
    """
    return look_at(os.fspath(source), revision, Options(on_unsupported=on_unsupported), tuple(tensor_parallel), context)


@public
def plan(
    source: StrPath,
    *,
    options: Options | None = None,
    layout: str | None = None,
    scale_dtype: str | None = None,
    on_unsupported: str | None = None,
    max_shard_size: str | int | None = None,
    fold_act_order: bool | None = None,
    revision: str | None = None,
) -> Planned:
    """What a conversion would write, tensor by tensor, from headers alone. Nothing is written.

    Args: as `convert`.

    Raises: as `convert`, before it writes.
    """
    chosen = _options(options, layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order)
    return runs.plan_only(runs.ConvertRequest(os.fspath(source), options=chosen, revision=revision))


@public
def convert(
    source: StrPath,
    out: StrPath | None = None,
    *,
    options: Options | None = None,
    layout: str | None = None,
    scale_dtype: str | None = None,
    on_unsupported: str | None = None,
    max_shard_size: str | int | None = None,
    fold_act_order: bool | None = None,
    revision: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    force: bool = False,
    ray: str | None = None,
    stream: bool = False,
    push_to: str | None = None,
    private: bool = True,
    branch: str | None = None,
    pr: bool = False,
    unverified: bool = False,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002  # the card's own word
    language: str | None = None,
    progress: ProgressCallback | None = None,
) -> Converted:
    """Convert, verify and write a ready-to-load repo. Called again after an interruption, it resumes.

    Args:
        source: folder with a quantized checkpoint, or `owner/name` on the Hub.
        out: folder to write; None: the source's name with the layout's, in the current folder.
        options: everything that changes the bytes, instead of the five arguments that follow.
        layout: `xpu` (default), or `compressed-tensors`, which stock loaders read.
        scale_dtype: round scales to `float16`, `bfloat16` or `float32`; default: as in the source.
        on_unsupported: modules that no kernel takes: `refuse` (default), or `dequantize` them to bf16.
        max_shard_size: largest output file, in bytes or as text: `5GB` (default), `512MiB`.
        fold_act_order: store an MLP's rows in the order that its act-order down_proj wants.
        revision: branch, tag or commit of a source on the Hub; default: main.
        jobs: workers; default: one per core, at most 8.
        verify: check every value of the output before it is published.
        force: replace an earlier conversion in `out`.
        ray: run on the Ray cluster at this address (`auto`, `host:port`), or on one started here (`local`).
        stream: keep only the shards of the source in use; with `push_to`, of the output too.
        push_to: publish the result on the Hub as `owner/name`.
        private: whether a repository that is created is.
        branch: push to this branch, created from main.
        pr: push to a pull request.
        unverified: publish also what was not verified.
        base_model: what the card calls the base: `owner/name` on the Hub that a folder is a copy of.
        license: licence in the card, as the Hub names it: `apache-2.0`, `mit`, `other`.
        language: languages in the card: `en`, or `en,zh`.
        progress: told how far the work is.

    Raises:
        UsageError: wrong arguments, or a folder that is not to be written. Nothing was written.
        UnsupportedError: modules without an exact layout, each with its reason. Nothing was written.
        DamagedError: the source contradicts itself.
        VerificationError: the output is wrong, or the Hub holds other bytes than were sent. Nothing loadable is left.
        NotVerifiedError: an earlier call finished it without verification, and this one asks for it.
        EnvironmentFault: disk, network, permissions, or an extra that is not installed.
    """
    request = runs.ConvertRequest(
        os.fspath(source),
        None if out is None else Path(out),
        _options(options, layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order),
        revision=revision,
        jobs=jobs or 0,
        verify=verify,
        force=force,
        ray=ray,
        stream=stream,
        destination=Destination.asked(push_to, private, branch, pr, unverified),
        card=CardFields(base_model, license, language),
    )
    with _reporter(progress) as reporter:
        return runs.convert(request, reporter)


@public
def convert_part(
    source: StrPath,
    out: StrPath,
    part: str,
    *,
    options: Options | None = None,
    layout: str | None = None,
    scale_dtype: str | None = None,
    on_unsupported: str | None = None,
    max_shard_size: str | int | None = None,
    fold_act_order: bool | None = None,
    revision: str | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> PartConverted:
    """Make one part of a conversion, for clusters that share a disk; `finish` puts the parts together.

    Args:
        part: `i/n`, from `1/n` to `n/n`. Other arguments as `convert`; the same for every part.

    Raises: as `convert`; UsageError: other parts there are of another source or of other options.
    """
    request = runs.ConvertRequest(
        os.fspath(source),
        Path(out),
        _options(options, layout, scale_dtype, on_unsupported, max_shard_size, fold_act_order),
        revision=revision,
        jobs=jobs or 0,
        part=parse_part(part),
    )
    with _reporter(progress) as reporter:
        return runs.convert_one_part(request, reporter)


@public
def finish(
    source: StrPath,
    out: StrPath,
    *,
    revision: str | None = None,
    jobs: int | None = None,
    verify: bool = True,
    push_to: str | None = None,
    private: bool = True,
    branch: str | None = None,
    pr: bool = False,
    unverified: bool = False,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002  # the card's own word
    language: str | None = None,
    progress: ProgressCallback | None = None,
) -> Converted:
    """Put the parts of a conversion together: check that all are there, verify, publish into `out`.

    The options are those of the parts. Where an earlier call came to the end, `is_new` of the result is False, and with
    `push_to` what is there is published.

    Args: as `convert`.

    Raises: as `convert`; DamagedError: some shards have not been made.
    """
    destination = Destination.asked(push_to, private, branch, pr, unverified)
    request = runs.FinishRequest(
        os.fspath(source),
        Path(out),
        revision,
        jobs or 0,
        verify,
        destination,
        CardFields(base_model, license, language),
    )
    with _reporter(progress) as reporter:
        return runs.put_together(request, reporter)


@public
def verify(
    out: StrPath,
    *,
    source: StrPath | None = None,
    revision: str | None = None,
    backends: Sequence[str] = (),
    every: bool = False,
    require_exact: bool = False,
    require_backends: Sequence[str] = (),
    report: StrPath | None = None,
    jobs: int | None = None,
    progress: ProgressCallback | None = None,
) -> Verdict:
    """Check a converted repo before it is deployed. It is only read. A failure is returned, not raised.

    Args:
        out: folder that `convert` wrote, or `owner/name` of a converted repo on the Hub, which is downloaded.
        source: what it was converted from; None: check against the digests recorded at conversion.
        revision: of a source on the Hub; None: the commit it was converted from.
        backends: kernel libraries that have to run, by name; none: all that run here do.
        every: run kernels on every matrix, all rows and all numbers of rows.
        require_exact: a value that was rounded or dequantized is a failure; without `source`, nothing is verified.
        require_backends: kernel libraries that have to compute every module.
        report: folder to write verify.json, .md, .html and .svg into.
        jobs: workers; default: one per core, at most 8.
        progress: told how far the work is.

    Returns:
        The verdict: `outcome` (verified, failed, not verified), `passed` where it is verified, `failures`, `gaps`,
        `warnings`, and everything behind them.

    Raises:
        UsageError: not a converted folder, an unknown backend. DamagedError: the source is not sound.
        EnvironmentFault: disk, network.
    """
    with _reporter(progress) as reporter:
        return verify_folder(
            os.fspath(out),
            source=None if source is None else os.fspath(source),
            revision=revision,
            backends=backends,
            every=every,
            require_exact=require_exact,
            require_backends=require_backends,
            report=None if report is None else Path(report),
            jobs=jobs or 0,
            reporter=reporter,
        )


@public
def diff(
    a: StrPath, b: StrPath, *, values: bool = True, decode: bool = True, progress: ProgressCallback | None = None
) -> Difference:
    """Compare the tensors of two folders, .safetensors files or repositories on the Hub, however they are sharded.

    Args:
        values: compare bytes too, not only names, dtypes and shapes.
        decode: compare the values of modules that the two store otherwise: a checkpoint and its conversion, a model
            quantized by two tools, or one that is not quantized. Not without `values`.
        progress: told how far downloads, the comparison of bytes and the decoding are.

    Returns:
        What they do not share; `equal` where that is nothing, `same_values` where only the way of storing differs.

    Raises:
        UsageError: no such folder or file. DamagedError: not sound safetensors files.
    """
    with _reporter(progress) as reporter:
        return compare(os.fspath(a), os.fspath(b), values=values, decode=decode, reporter=reporter)


@public
def push(
    out: StrPath,
    repo_id: str,
    *,
    private: bool = True,
    branch: str | None = None,
    pr: bool = False,
    unverified: bool = False,
    token: str | bool | None = None,
    endpoint: str | None = None,
    progress: ProgressCallback | None = None,
) -> Pushed:
    """Publish a converted folder on the Hub in one commit. Called again, it sends only what is missing.

    Args:
        repo_id: `owner/name`, created where it is not there.
        private: whether a repository that is created is.
        branch: push to this branch, created from main.
        pr: push to a pull request.
        unverified: also what was converted without verification.
        token: of the Hub; default: the client's own login; False: none.
        endpoint: address of another Hub.
        progress: told how far the upload is.

    Raises:
        UsageError: not a finished conversion, a bad repo id, `branch` with `pr`.
        NotVerifiedError: it was converted without verification.
        DamagedError: a shard is not what the conversion wrote.
        VerificationError: the Hub holds other bytes than were sent.
        EnvironmentFault: network, permissions.
    """
    with _reporter(progress) as reporter:
        destination = Destination(repo_id, private, branch, pr, unverified)
        return publish.push(Path(out), destination, reporter, token=token, endpoint=endpoint)


@public
def explain(
    source: StrPath, module: str, *, on_unsupported: str = "refuse", revision: str | None = None
) -> Explanation | StoredModule:
    """One module of a checkpoint: its tensors, what was decided from them, what it becomes, which kernel runs it. Of a
    converted repo: what it was, what was decided then, what it is stored as.

    Args:
        module: its name, or that of a tensor or an expert of it.
        source, on_unsupported, revision: as `inspect`.

    Raises:
        UsageError: no quantized module is called so. Otherwise as `inspect`.
    """
    return look_into(os.fspath(source), revision, module, Options(on_unsupported=on_unsupported))


@public
def doctor() -> Diagnosis:
    """Which kernel backends run here, why others do not, and what would change that. Runs no kernel."""
    return examine()


def _options(
    options: Options | None,
    layout: str | None,
    scale_dtype: str | None,
    on_unsupported: str | None,
    max_shard_size: str | int | None,
    fold_act_order: bool | None,
) -> Options:
    """`options`, or those that the arguments give."""
    given = {
        "layout": layout,
        "scale_dtype": scale_dtype,
        "on_unsupported": on_unsupported,
        "max_shard_size": max_shard_size,
        "fold_act_order": fold_act_order,
    }
    chosen = {name: value for name, value in given.items() if value is not None}
    if options is None:
        return Options(**chosen)  # type: ignore[arg-type]
    if chosen:
        raise UsageError(f"{', '.join(chosen)}: give them in `options`, or as arguments, not both")
    return options


@contextmanager
def _reporter(progress: ProgressCallback | None) -> Iterator[Reporter]:
    if progress is None:
        yield Silent()
        return
    with Calls(progress) as reporter:
        yield reporter
