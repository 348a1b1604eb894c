"""Integrity: the files of a repo are those that were written, and agree with each other.

xpuquant.json holds the sha256 of every file of the conversion and, in its first field, of itself; verify.json does the
same for the reports. README.md is left out: people edit model cards. Then headers, index and config.json are compared
both ways, and with the list of modules and tensors that the conversion recorded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.checksums import hash_file, is_sealed, limit_of, wrong_size
from xpuquant.conversion.repo.converted import Repo, open_repo
from xpuquant.conversion.repo.journal import PROVENANCE
from xpuquant.conversion.sources.repo_files import json_limit, list_files, parse_json
from xpuquant.conversion.sources.unfinished import begun
from xpuquant.conversion.tree import Identity, Tree
from xpuquant.conversion.verify.foreign import UNPROTECTED, hidden_files, is_pickle, loadable
from xpuquant.conversion.verify.record_form import check_form
from xpuquant.conversion.verify.threads import run_all
from xpuquant.conversion.verify.verdict import Finding
from xpuquant.conversion.walk import is_hidden
from xpuquant.errors import DamagedError, EnvironmentFault, UsageError, XpuquantError, one_line
from xpuquant.formats.guard import guarded
from xpuquant.formats.scheme import expand
from xpuquant.values import frozen

VERDICT = "verify.json"
REPORTS = ("verify.md", "verify.html", "verify.svg")


@frozen
class Integrity:
    """What was found.

    record  xpuquant.json; None where it cannot be read
    repo    the repo, open; None where its files contradict each other
    files   files whose sha256 was compared
    known   name → which file it was, before anything was read
    """

    findings: tuple[Finding, ...]
    record: Mapping[str, Any] | None
    repo: Repo | None
    files: int
    known: Mapping[str, Identity] = field(default_factory=dict)


def weigh(folder: Path) -> int:
    """Bytes that `check_integrity` will hash, for the progress bar."""
    tree = Tree(folder)
    return sum(tree.size(name) for name in list_files(folder) if name not in UNPROTECTED)


def check_integrity(folder: Path, jobs: int, progress: Progress) -> Integrity:
    """Compare every file with its recorded sha256, and the files with each other.

    Raises:
        UsageError: not a finished conversion. EnvironmentFault: unreadable files.
    """
    tree, known = Tree(folder), _known(folder)
    content = _provenance(folder)
    found: list[Finding] = []
    if not is_sealed(content):
        found.append(_wrong(PROVENANCE, "is not as it was written: its own sha256 differs"))
    try:
        record = parse_json(content, PROVENANCE)
        listed = _listed_files(record)
    except DamagedError as error:
        return Integrity((*found, _wrong(PROVENANCE, str(error))), None, None, 0, known)
    progress(len(content))
    present = list_files(folder)
    there = set(present)
    sizes = {name: entry["bytes"] for name, entry in record["shards"].items()}
    calls = [
        partial(_file, tree, name, sha256, progress, sizes.get(name))
        for name, sha256 in listed.items()
        if name in there
    ]
    strays = tree.strays((*listed, VERDICT, *REPORTS, *UNPROTECTED))
    found += [_wrong(name, f"{what}; move it away") for name, what in strays.items()]
    found += [_wrong(name, "is missing") for name in listed if name not in there and name not in strays]
    found += [finding for finding in run_all(jobs, calls) if finding is not None]
    found += _unlisted(list(dict.fromkeys((*present, *hidden_files(folder)))), listed)
    found += _unprotected(tree, present)
    # Where the reports' own hashes cannot be read, which was said, nothing can be said of the reports.
    found += _reports(tree, present, progress) if VERDICT not in strays else []
    if strays.keys() & listed.keys():  # what reads them would say the same again
        return Integrity(tuple(found), record, None, len(listed) + 1, known)
    repo: Repo | None = None
    try:
        repo = open_repo(folder)
        with guarded(PROVENANCE):
            found += _same_modules(record, repo)
    except EnvironmentFault:
        raise
    except XpuquantError as error:
        found.append(_wrong(folder.name or str(folder), str(error)))
    return Integrity(tuple(found), record, repo, len(listed) + 1, known)


def _known(folder: Path) -> dict[str, Identity]:
    """Which files lie there. What cannot be looked at is said later, by who wants to read it."""
    tree, found = Tree(folder), dict[str, Identity]()
    if folder.is_dir():
        for name in list_files(folder):
            with suppress(OSError, XpuquantError):
                found[name] = tree.identity(name)
    return found


def check_unchanged(folder: Path, known: Mapping[str, Identity]) -> list[Finding]:
    """Whether the files of a repo are still those that they were before the first was read: what has been hashed is
    what has been decoded."""
    now = _known(folder)
    names = sorted(name for name in {*known, *now} if known.get(name) != now.get(name))
    return [_wrong(name, "changed while it was being verified") for name in names]


def check_written(shards: Sequence[Shard], tree: Tree) -> tuple[Finding, ...]:
    """Compare headers and sizes of shards that have just been written, read again, with those planned. Their sha256
    were taken from the bytes as they were written, and every value is compared with the source: see `exactness.py`.

    Raises:
        EnvironmentFault: unreadable files.
    """
    found: list[Finding] = []
    for shard in shards:
        try:
            with os.fdopen(tree.open(shard.name), "rb") as file:
                header, nbytes = file.read(len(shard.header)), os.fstat(file.fileno()).st_size
        except OSError as error:
            raise EnvironmentFault(f"{error.filename}: cannot be read ({error.strerror})") from error
        if header != shard.header:
            found.append(_wrong(shard.name, "its header is not the one that was written"))
        if nbytes != shard.nbytes:
            found.append(_wrong(shard.name, f"has {nbytes} bytes, {shard.nbytes} were written"))
    return tuple(found)


def _wrong(where: str, what: str) -> Finding:
    return Finding("integrity", where, one_line(what))


def _provenance(folder: Path) -> bytes:
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    tree = Tree(folder)
    try:
        return tree.read(PROVENANCE, json_limit(PROVENANCE))
    except FileNotFoundError:
        if (left := begun(tree)) is not None:
            raise UsageError(f"{folder}: {left}") from None
        raise UsageError(f"{folder}: has no {PROVENANCE}; it was not converted by xpuquant") from None
    except OSError as error:
        raise EnvironmentFault(f"{folder / PROVENANCE}: cannot be read ({error.strerror})") from error


def _listed_files(record: Mapping[str, Any]) -> dict[str, str]:
    """file → sha256. Raises DamagedError where xpuquant.json does not list them."""
    check_form(record)
    table = {**{name: entry["sha256"] for name, entry in record["shards"].items()}, **record["files"]}
    for name in table:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DamagedError(f"names a file outside the folder: {name}")
    return table


def _file(tree: Tree, name: str, sha256: str, progress: Progress, nbytes: Any = None) -> Finding | None:
    wrong = wrong_size(tree, name, nbytes)
    if wrong is not None:
        return _wrong(name, wrong)
    try:
        found = hash_file(tree, name, limit_of(nbytes), progress)
    except DamagedError as error:
        return _wrong(name, str(error))
    if found is None:
        return _wrong(name, "is missing")
    if found != sha256:
        return _wrong(name, f"has sha256 {found[:12]}…, was written with {sha256[:12] or 'none'}…")
    return None


def _unprotected(tree: Tree, present: Sequence[str]) -> list[Finding]:
    """Files that anybody may edit, and that are no files of such by their size."""
    sizes = {name: wrong_size(tree, name, None) for name in UNPROTECTED if name in present}
    return [_wrong(name, wrong) for name, wrong in sizes.items() if wrong is not None]


def _reports(tree: Tree, present: list[str], progress: Progress) -> list[Finding]:
    """verify.json is sealed and holds the sha256 of the other reports. They are no part of the model: one that was
    deleted is none, one that was changed is a failure."""
    if VERDICT not in present:
        lost = f"cannot be compared: {VERDICT}, which holds its sha256, is missing"
        return [_wrong(name, lost) for name in REPORTS if name in present]
    try:
        content = tree.read(VERDICT, json_limit(VERDICT))
        progress(len(content))
        if not is_sealed(content):
            return [_wrong(VERDICT, "is not as it was written: its own sha256 differs")]
        hashes = parse_json(content, VERDICT).get("reports", {})
    except DamagedError as error:
        return [_wrong(VERDICT, str(error))]
    if not isinstance(hashes, dict):
        return [_wrong(VERDICT, "lists no reports")]
    found: list[Finding] = []
    for name in REPORTS:
        if name in present:
            wrong = _file(tree, name, str(hashes.get(name, "")), progress)
            found += [wrong] if wrong is not None else []
    return found


def _unlisted(present: list[str], listed: Mapping[str, str]) -> list[Finding]:
    """Files that the conversion did not write. Those fail that a loader may run or read; so do pickles that it is said
    to have written, for it writes none."""
    found: list[Finding] = []
    for name in present:
        parts = PurePosixPath(name).parts
        if name in listed and not is_pickle(name):
            continue
        if name in (PROVENANCE, VERDICT, *REPORTS) or parts[-1] in UNPROTECTED:
            continue
        danger = loadable(name)
        if danger is None and is_hidden(name):
            continue
        what = "was not written by the conversion" if name not in listed else "is recorded, but no conversion writes it"
        said = what if danger is None else f"{what}, and {danger}"
        found.append(Finding("integrity", one_line(name), said, fails=danger is not None))
    return found


def _same_modules(record: Mapping[str, Any], repo: Repo) -> list[Finding]:
    """No module and no tensor more or less than the conversion recorded."""
    modules: Mapping[str, Any] = record.get("modules", {})
    found: list[Finding] = []
    dequantized = {name for name, entry in modules.items() if entry.get("dequantized")}
    for name in sorted(modules.keys() - repo.modules.keys() - dequantized):
        found.append(_wrong(name, "is quantized by xpuquant.json, but config.json does not name it"))
    for name, stored in sorted(repo.modules.items()):
        entry = modules.get(name)
        if entry is None:
            found.append(_wrong(name, "is in config.json, but xpuquant.json does not record it"))
        elif entry.get("scheme") != stored.scheme.label():
            found.append(_wrong(name, f"config.json says {stored.scheme.label()}, xpuquant.json {entry.get('scheme')}"))
    expected = {name for pattern in record.get("unquantized", ()) for name in expand(pattern)}
    expected |= {tensor for name in dequantized for tensor in modules[name]["dequantized"]}
    for name in sorted(expected - repo.plain.keys()):
        found.append(_wrong(name, "is missing"))
    for name in sorted(repo.plain.keys() - expected):
        found.append(_wrong(name, f"is in {repo.plain[name].file}, but nothing in the source gives it"))
    return found
