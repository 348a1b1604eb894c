"""Checking shards in the staging folder, before they are published: as they are written, or when all of them are.

What flows where it is done meanwhile: the threads that write tell how far their shards have come, a module is compared
with the source as soon as all of it has been written, and its pages are given back. So the disk and the processor are
at work at the same time; what is compared is still in memory, however large the model, and so is what it was made from.
Headers and sizes are compared at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

from xpuquant.conversion.plan.plan import Plan
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.journal import PRODUCER, Finished
from xpuquant.conversion.repo.staging import Staging
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.tree import Tree
from xpuquant.conversion.write.arrivals import Arrivals
from xpuquant.conversion.write.execute import execute_plan
from xpuquant.conversion.write.read_ahead import Stopped
from xpuquant.conversion.write.read_back import ReadBack
from xpuquant.conversion.write.shard_writer import ShardStore
from xpuquant.errors import VerificationError
from xpuquant.formats.scheme import QUANT_METHOD

# What verifies and what writes reports is imported when it is needed: the first byte does not wait for it.
if TYPE_CHECKING:
    from xpuquant.conversion.verify.context import Check
    from xpuquant.conversion.verify.verdict import Verdict


def is_checked_meanwhile(plan: Plan, jobs: int) -> bool:
    """Whether shards are checked while others are written: by other threads, and where the headers alone say which
    modules there are, which those of compressed-tensors do not."""
    return jobs > 1 and plan.quantization_config(PRODUCER).get("quant_method") == QUANT_METHOD


def make_and_check(
    plan: Plan, source: Source, staging: Staging, done: dict[str, Finished], jobs: int, reporter: Reporter
) -> tuple[dict[str, Finished], Verdict]:
    """Write the shards of a plan, and check them meanwhile. The phase of writing has begun.

    Args:
        done: shards of an earlier run, which have been hashed since.

    Raises: as `execute_plan` and `check_staged`.
    """

    def judge(check: Check) -> Verdict:
        from xpuquant.conversion.verify.context import Origin
        from xpuquant.conversion.verify.noted import known_of
        from xpuquant.conversion.verify.run import verify_staged

        known = known_of(staging.tree, done, staging.plan)
        return verify_staged(Origin(plan, source), check, staging.out.resolve().name, PRODUCER, known)

    return _meanwhile(plan, source, staging, done, jobs, reporter, judge)


def make_and_check_part(
    plan: Plan,
    source: Source,
    store: ShardStore,
    name: str,
    done: dict[str, Finished],
    jobs: int,
    reporter: Reporter,
) -> tuple[dict[str, Finished], Verdict]:
    """The same of a part, whose verdict is that of `check_part`.

    Args:
        name: the repo's name in the verdict.
    """

    def judge(check: Check) -> Verdict:
        from xpuquant.conversion.verify.context import Origin
        from xpuquant.conversion.verify.run import verify_values

        return verify_values(Origin(plan, source), check, name, PRODUCER)

    return _meanwhile(plan, source, store, done, jobs, reporter, judge)


def _meanwhile(
    plan: Plan,
    source: Source,
    store: ShardStore,
    done: dict[str, Finished],
    jobs: int,
    reporter: Reporter,
    judge: Callable[[Check], Verdict],
) -> tuple[dict[str, Finished], Verdict]:
    arrivals = Arrivals()
    reader, told = ReadBack(store.files, arrivals), _Told(reporter)

    def checked() -> Verdict:
        with arrivals.stopping():
            if plan.shards:
                # What is imported now would take the interpreter from those who open the first.
                arrivals.wait_for_any()
            from xpuquant.conversion.repo.converted import ReadableRepo
            from xpuquant.conversion.verify.context import Check

            # As the headers say that are written; that they were, is compared at the end.
            tensors = {name: tensor for shard in plan.shards for name, tensor in shard.places().items()}
            repo = ReadableRepo(store.files, tensors, reader.read, plan.quantization_config(PRODUCER))
            return judge(Check(repo, jobs=jobs, progress=told.advance, arrivals=arrivals, done_with=reader.done_with))

    try:
        # Whatever ends this thread's part, an interruption too, the check does not go on to its end.
        with ThreadPoolExecutor(1, "check") as beside, arrivals.stopping():
            checking = beside.submit(checked)
            shards = execute_plan(plan, source, store, jobs, done, reporter.advance, True, arrivals)
            told.begin(_checked_bytes(plan))
            verdict = checking.result()
        reader.check_unchanged()
    except Stopped:
        raise arrivals.cause or Stopped() from None
    finally:
        reader.close()
    source.check_unchanged()
    raise_failures(verdict, store.files, plan)
    return shards, verdict


class _Told:
    """Bytes that have been checked, those of before the phase of checking too: it begins with them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._before: int | None = 0
        self._lock = threading.Lock()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            if self._before is not None:
                self._before += nbytes
                return
        self._reporter.advance(nbytes)

    def begin(self, total: int) -> None:
        """The phase begins.

        Args:
            total: bytes to be checked, those of before too.
        """
        with self._lock:
            self._reporter.phase("verify", total, self._before or 0)
            self._before = None


def check_staged(
    plan: Plan, source: Source, staging: Staging, shards: Mapping[str, Finished], jobs: int, reporter: Reporter
) -> Verdict:
    """Check the staged shards against the source. What parts noted of theirs where they were made is not compared
    again: `shards` have been hashed since.

    Raises:
        VerificationError: something differs; `verify.json` in the staging folder has all of it.
    """
    from xpuquant.conversion.verify.context import Origin
    from xpuquant.conversion.verify.noted import known_of
    from xpuquant.conversion.verify.run import verify_staged

    known = known_of(staging.tree, shards, staging.plan)
    with _opened(plan, staging.files, jobs, reporter) as check:
        verdict = verify_staged(Origin(plan, source), check, staging.out.resolve().name, PRODUCER, known)
    source.check_unchanged()
    raise_failures(verdict, staging.files, plan)
    return verdict


def check_part(plan: Plan, source: Source, staged: Tree, name: str, jobs: int, reporter: Reporter) -> Verdict:
    """Check the shards of a part against the source: every value, which is all but the work of the kernels.

    Args:
        plan: of the part.
        name: the repo's name in the verdict.

    Raises: as `check_staged`.
    """
    from xpuquant.conversion.verify.context import Origin
    from xpuquant.conversion.verify.run import verify_values

    with _opened(plan, staged, jobs, reporter) as check:
        verdict = verify_values(Origin(plan, source), check, name, PRODUCER)
    source.check_unchanged()
    raise_failures(verdict, staged, plan)
    return verdict


@contextmanager
def _opened(plan: Plan, staged: Tree, jobs: int, reporter: Reporter) -> Iterator[Check]:
    """What a verification of a plan's shards needs to know."""
    from xpuquant.conversion.repo.converted import Repo
    from xpuquant.conversion.verify.context import Check

    reporter.phase("verify", _checked_bytes(plan))
    repo = Repo(staged, tuple(shard.name for shard in plan.shards), plan.quantization_config(PRODUCER))
    try:
        yield Check(repo, jobs=jobs, progress=reporter.advance)
        repo.reader.check_unchanged()
    finally:
        repo.reader.close()


def _checked_bytes(plan: Plan) -> int:
    return sum(tensor.nbytes for shard in plan.shards for tensor in shard.tensors)


def raise_failures(verdict: Verdict, staged: Tree, plan: Plan) -> None:
    """Raises VerificationError where something failed; the reports beside the shards have all of it.

    Args:
        plan: of what was verified.
    """
    from xpuquant.conversion.report.reports import write_reports
    from xpuquant.conversion.verify.verdict import Outcome

    if verdict.outcome is Outcome.FAILED:
        write_reports(staged, verdict)
        first, *more = (f"{finding.where}: {finding.what}" for finding in verdict.failing)
        also = f" (and {len(more)} more in {staged.path / 'verify.json'})" if more else ""
        message = f"verification failed: {first}{also}; the output was not published"
        raise VerificationError(message, files=_files_of(plan, {finding.where for finding in verdict.failing}))


def _files_of(plan: Plan, places: Set[str]) -> frozenset[str] | None:
    """The shards in which a module, a tensor or a file lies; None where one of the places is none of these."""
    shards = {tensor.name: shard.name for shard in plan.shards for tensor in shard.tensors}
    found: dict[str, Iterable[str]] = {shard.name: [shard.name] for shard in plan.shards}
    found |= {name: [shard] for name, shard in shards.items()}
    found |= {
        module.conversion.name: [shards[tensor.name] for tensor in module.conversion.tensors] for module in plan.modules
    }
    if not places <= found.keys():
        return None
    return frozenset(shard for place in places for shard in found[place])
