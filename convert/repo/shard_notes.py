"""What a run knows of shards that earlier runs made, and what it notes of its own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from xpuquant.conversion.options import cores
from xpuquant.conversion.repo.checksums import hashed
from xpuquant.conversion.repo.journal import Finished, JournalFile, Reached, Record
from xpuquant.conversion.sizes import counted, size
from xpuquant.conversion.tree import Tree, Written


class ShardNotes:
    """A run's journal, and what the journals of earlier runs say.

    files  where shards are made
    kept   bytes of earlier runs that need not be made again, by shard
    """

    def __init__(self, files: Tree, journal: JournalFile, note: Callable[[str], None]) -> None:
        """
        Args:
            journal: where this run notes its shards.
            note: told what of an earlier run is kept.
        """
        self.files = files
        self.kept: dict[str, int] = {}
        self._journal = journal
        self._note = note
        self._reached: dict[str, list[Reached]] = {}
        self._shards: dict[str, Written] = {}

    def go_on(self, records: Collection[Record], sizes: Mapping[str, int]) -> dict[str, Finished]:
        """Take what earlier runs noted; returns the shards that they finished and that are still as they say.

        Args:
            sizes: bytes of each shard of the plan. A journal may be a stranger's: what has another size is not read.
        """
        for record in records:
            for shard, steps in record.reached.items():
                self._reached.setdefault(shard, []).extend(steps)
        entries = [
            (name, finished)
            for record in records
            for name, finished in record.finished.items()
            if finished.nbytes == sizes.get(name)
        ]
        self._shards = _still_there(self.files, entries)
        done = {name: finished for name, finished in entries if name in self._shards}
        self.kept |= {name: finished.nbytes for name, finished in done.items()}
        if done:
            total = size(sum(finished.nbytes for finished in done.values()))
            self._note(f"resumed: {counted(len(done), 'finished shard')} kept, {total}")
        return done

    def finish(self, shard: str, finished: Finished) -> None:
        """Note a complete shard."""
        self._shards[shard] = Written(finished.sha256, self.files.identity(shard))
        self._journal.append(shard, finished)

    def reached(self, shard: str) -> Sequence[Reached]:
        """How far earlier runs came with a shard, as they noted it: to be hashed before it is believed."""
        return self._reached.get(shard, ())

    def note_reached(self, shard: str, reached: Reached) -> None:
        """Note how far a shard has come."""
        self._journal.append_reached(shard, reached)

    def keep(self, shard: str, nbytes: int) -> None:
        """An unfinished shard of an earlier run was sound up to there."""
        self.kept[shard] = nbytes
        self._note(f"resumed: {size(nbytes)} of {shard} kept")

    def noted_bytes(self, done: Mapping[str, Finished]) -> int:
        """Bytes of unfinished shards that lie here already, by what earlier runs noted."""
        here = [name for name in self._reached if name not in done and self.files.holds(name)]
        return sum(min(self.files.size(name), max(step.nbytes for step in self._reached[name])) for name in here)


def _still_there(files: Tree, noted: Iterable[tuple[str, Finished]]) -> dict[str, Written]:
    """The shards that are still what a journal says. What lies in their places and is no file, is not. They are hashed
    side by side, one on each core: all of a large conversion's may be."""

    def look(name: str, finished: Finished) -> Written | None:
        if not files.holds(name) or files.size(name) != finished.nbytes:
            return None
        written = hashed(files, name, finished.nbytes)
        return written if written.sha256 == finished.sha256 else None

    entries = list(noted)
    with ThreadPoolExecutor(cores(), "hash") as threads:
        found = threads.map(lambda entry: look(*entry), entries)
        return {name: there for (name, _), there in zip(entries, found, strict=True) if there is not None}
