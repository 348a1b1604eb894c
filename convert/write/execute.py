"""Carry out a plan: read each source byte once, write each output byte once, hash on the way.

What flows: as many shards as there are jobs are written at the same time, each by one thread (`shard_writer.py`), in
the order of the plan.

What survives a crash: a shard that is finished is noted with its sha256 in the journal; an unfinished one lies in the
staging folder, where nothing can open it as a model, and is gone on with from the last place that was noted of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.plan.shards import Shard
from xpuquant.conversion.progress import Progress
from xpuquant.conversion.repo.journal import Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.conversion.write.read_ahead import Stopped, Workers
from xpuquant.conversion.write.shard_writer import ShardStore, ShardWriter


def execute_plan(
    plan: Plan,
    source: Source,
    staging: ShardStore,
    jobs: int,
    done: dict[str, Finished],
    progress: Progress,
    read_again: bool = True,
    arrivals: Arrivals | None = None,
) -> dict[str, Finished]:
    """Write every shard of the plan that is not done into the staging folder.

    Args:
        jobs: threads at work.
        done: finished shards of an earlier run; counted as progress at once.
        read_again: whether the shards are read again, out of the page cache: soon, or when all are written.
        arrivals: told what has been written, for who reads it meanwhile.

    Returns:
        Shard name → sha256 and size, of all shards.

    Raises:
        EnvironmentFault: disk full, unreadable or unwritable files.
        DamagedError: the source changed or ended early.
    """
    # What else a journal lists, which may be a stranger's, is none of this plan's.
    finished = {shard.name: done[shard.name] for shard in plan.shards if shard.name in done}
    waiting = [shard for shard in plan.shards if shard.name not in done]
    for shard in plan.shards:
        if shard.name in done:
            progress(shard.nbytes)
            if arrivals is not None:
                arrivals.tell(shard.name, shard.nbytes)
    owners = max(1, min(jobs, len(waiting)))
    with Workers(jobs) as workers, ThreadPoolExecutor(owners, "shard") as threads:

        def write(shard: Shard) -> tuple[str, Finished]:
            with workers.slot():
                result = ShardWriter(shard, source, staging, workers, progress, read_again, arrivals).run()
            source.check_unchanged()
            staging.finish(shard.name, result)
            if arrivals is not None:
                arrivals.tell(shard.name, shard.nbytes)
            return shard.name, result

        running = [threads.submit(write, shard) for shard in waiting]
        try:
            for future in running:
                name, result = future.result()
                finished[name] = result
        except BaseException as error:
            workers.stop.set()
            for future in running:
                future.cancel()
            raise _cause(running, error) from None
    return finished


def _cause(running: Sequence[Future[tuple[str, Finished]]], error: BaseException) -> BaseException:
    """The error that stopped the others, where `error` is only that of one that was stopped."""
    if not isinstance(error, Stopped):
        return error
    errors = [future.exception() for future in running if not future.cancelled()]
    return next((other for other in errors if other is not None and not isinstance(other, Stopped)), error)
