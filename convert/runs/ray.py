"""The plan's shards as tasks of a Ray cluster, over storage that every node sees under the same path.

What flows: the driver holds the lock and the journal. Each task gets the name of a shard; its worker opens the source
and plans once (a plan is a function of source and options, and its digest must be the driver's), writes the shard in a
folder of its own and moves it when it is complete; then it compares what it has written with the source and notes the
verdict, so that the driver has nothing to compare. The driver notes the shard in the journal and moves the progress on.
A repository on the Hub is read from where the driver downloaded it; a node that does not see that folder downloads
the shards it needs into its own cache.

What survives: a worker or node that is lost takes its running tasks with it, and Ray gives them to others; two that
write the same shard, because a lost one was not dead, write equal bytes in different places. A lost driver resumes as
any conversion does.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.plan.plan import Plan, make_plan
from xpuquant.conversion.progress import Progress, Silent
from xpuquant.conversion.repo.journal import STAGING, Finished, Reached
from xpuquant.conversion.repo.staging import VERIFIED_PART, Staging, staged_files
from xpuquant.conversion.runs.staged import check_part
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.folder import LocalSource
from xpuquant.conversion.sources.open import open_source
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.errors import Argument, DamagedError, EnvironmentFault, UsageError
from xpuquant.values import frozen

LOCAL = "local"
_RETRIES = 10
"""Times a task is given to another worker after its own was lost. Errors of ours are not retried."""

_PROBE_SECONDS = 10.0


@frozen
class Assignment:
    """What a worker needs to know besides the shard.

    source    as the driver's is named; `revision` is the commit of one from the Hub
    folder    where the driver reads it; None where it reads from the Hub itself
    digest    of the driver's plan and source
    out       the output folder, in whose staging folder finished shards go
    jobs      threads of one task
    verify    compare each shard with the source where it was made
    """

    source: str
    revision: str | None
    folder: Path | None
    options: Options
    digest: str
    out: Path
    jobs: int
    verify: bool = False


class _Attempt:
    """A folder of its own for one attempt at one shard; the driver keeps the journal."""

    def __init__(self, out: Path) -> None:
        self._target = staged_files(out)
        self._staging = Tree(out).below(STAGING)
        self._name = f"attempt-{os.getpid()}-{uuid.uuid4().hex}"
        self.files = self._staging.below(self._name)
        self.files.make()

    def finish(self, shard: str, finished: Finished) -> None:
        self.files.sync(shard)  # another machine will read it
        self.files.move(shard, self._target)
        self._staging.remove_empty(self._name)

    def reached(self, shard: str) -> Sequence[Reached]:
        return ()  # another attempt's folder is another's

    def note_reached(self, shard: str, reached: Reached) -> None:
        pass

    def keep(self, shard: str, nbytes: int) -> None:
        pass


def execute_on_ray(
    plan: Plan,
    source: Source,
    staging: Staging,
    *,
    jobs: int,
    done: dict[str, Finished],
    progress: Progress,
    read_again: bool = True,
    address: str,
    verify: bool = False,
) -> dict[str, Finished]:
    """Like `execute.execute`, on the Ray cluster at `address` (`auto`, `ray://host:port`, `host:port`), or one
    started here (`local`). Workers write through the page cache, whatever `read_again` says: shared storage has its own
    ideas of O_DIRECT.

    Args:
        verify: each shard where it was made.

    Raises:
        EnvironmentFault: Ray is not installed, not reachable, or lost too many workers.
        VerificationError: a shard is wrong.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, address, jobs)
    assignment = Assignment(
        source.name,
        source.revision,
        source.folder.resolve() if isinstance(source, LocalSource) else None,
        plan.options,
        plan.digest(source.fingerprint()),
        staging.out.resolve(),
        jobs,
        verify,
    )
    finished = {shard.name: done[shard.name] for shard in plan.shards if shard.name in done}
    for shard in plan.shards:
        if shard.name in done:
            progress(shard.nbytes)
    try:
        task = ray.remote(num_cpus=jobs, max_retries=_RETRIES)(write_shard)
        running = {task.remote(assignment, shard.name): shard for shard in plan.shards if shard.name not in finished}
        while running:
            ready, _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(ready[0])
            result = _result(ray, ready[0], shard.name)
            staging.finish(shard.name, result)
            finished[shard.name] = result
            progress(shard.nbytes)
    finally:
        if started:
            ray.shutdown()
    source.check_unchanged()
    return finished


def write_shard(assignment: Assignment, name: str) -> Finished:
    """Make one shard, and note the verdict on it where that is asked for; runs on a worker."""
    source, plan = _planned(assignment)
    out, jobs = assignment.out, assignment.jobs
    part = plan.part([shard for shard in plan.shards if shard.name == name])
    finished = execute_plan(part, source, _Attempt(out), jobs, {}, _silent)[name]
    if assignment.verify:
        from xpuquant.conversion.verify.noted import note_verdict

        verdict = check_part(part, source, staged_files(out), out.name, jobs, Silent())
        held = {name: finished}
        note_verdict(Tree(out).below(STAGING), f"{name}{VERIFIED_PART}", verdict, held, assignment.digest)
    return finished


@cache
def _planned(assignment: Assignment) -> tuple[Source, Plan]:
    source = _opened(assignment)
    plan = make_plan(source.checkpoint, assignment.options)
    if plan.digest(source.fingerprint()) != assignment.digest:
        raise DamagedError(f"{assignment.source}: is not the same on every node; is it on shared storage?")
    return source, plan


def _opened(assignment: Assignment) -> Source:
    folder, commit = assignment.folder, assignment.revision
    if commit is None:
        return open_source(assignment.source if folder is None else str(folder))
    from xpuquant.conversion.sources.hub import CachedSource

    if folder is not None:
        # Not shared after all, or another, incomplete cache at the same place: the Hub has it.
        with suppress(DamagedError, EnvironmentFault, UsageError):
            return CachedSource(folder, assignment.source, commit)
    return open_source(assignment.source, commit, stream=True)


def _silent(nbytes: int) -> None:
    pass


def _result(ray: Any, reference: Any, shard: str) -> Finished:
    try:
        result: Finished = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise EnvironmentFault(f"{shard}: the cluster lost it {_RETRIES} times ({type(error).__name__})") from None
    return result


def _probe(address: str) -> None:
    """Ray itself tries for minutes to reach an address where nothing listens."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _PROBE_SECONDS).close()
    except OSError as error:
        reason = error.strerror or error
        raise EnvironmentFault(
            Argument("ray", address), f": cannot connect ({reason}); is the cluster's head running?"
        ) from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise EnvironmentFault(Argument("ray"), " needs Ray: pip install 'xpuquant[ray]'") from None
    return ray


def _connect(ray: Any, address: str, jobs: int) -> None:
    _probe(address)
    options: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False, "logging_level": "error"}
    try:
        if address == LOCAL:
            # Without "local", Ray joins whatever cluster another program left behind on this machine.
            cpus = max(jobs, os.cpu_count() or 1)
            ray.init(address="local", num_cpus=cpus, _node_ip_address="127.0.0.1", **options)
        else:
            options.pop("include_dashboard")
            ray.init(address=address, **options)
    except Exception as error:  # Ray raises whatever its transport raised
        raise EnvironmentFault(
            Argument("ray", address), f": cannot connect ({type(error).__name__}: {error})"
        ) from None
