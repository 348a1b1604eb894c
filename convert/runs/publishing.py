"""Publishing a conversion on the Hub, and knowing one that was made before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xpuquant.conversion.options import Options
from xpuquant.conversion.progress import Reporter
from xpuquant.conversion.repo.journal import PROVENANCE, STAGING, Finished
from xpuquant.conversion.sources.base import Source
from xpuquant.conversion.sources.repo_files import read_json
from xpuquant.errors import UsageError

if TYPE_CHECKING:
    from xpuquant.conversion.hub.publish import Pushed


@dataclass(frozen=True)
class Destination:
    """Where a conversion is published.

    repo_id  `owner/name`; created where it is not there
    private  of a repository that is created
    branch   push there; it is created from main
    pr       push to a pull request

    Raises:
        UsageError: both `branch` and `pr`.
    """

    repo_id: str
    private: bool = True
    branch: str | None = None
    pr: bool = False

    def __post_init__(self) -> None:
        if self.branch and self.pr:
            raise UsageError("--branch and --pr exclude each other: a pull request is against main")

    def check_source(self, name: str) -> None:
        """Raises UsageError where a conversion would overwrite the repository it comes from."""
        if self.repo_id == name and not (self.branch or self.pr):
            raise UsageError(
                f"--push-to {name} would replace the source; push to another repository, a --branch or a --pr"
            )


def push_folder(
    out: Path, to: Destination, reporter: Reporter, token: str | None = None, endpoint: str | None = None
) -> Pushed:
    """Publish a converted folder; see `hub.publish.push` for what it raises."""
    from xpuquant.conversion.hub import publish

    total = sum((out / name).stat().st_size for name in publish.local_files(out))
    reporter.phase("push", total)
    return publish.push(
        out,
        to.repo_id,
        private=to.private,
        branch=to.branch,
        pr=to.pr,
        token=token,
        endpoint=endpoint,
        report=reporter.advance,
    )


def converted_shards(out: Path, source: Source, options: Options) -> dict[str, Finished] | None:
    """The shards of a folder that is the finished conversion of a source with these options; None of any other."""
    if (out / STAGING).exists() or not (out / PROVENANCE).exists() or not (out / "config.json").exists():
        return None
    record = read_json(out / PROVENANCE)
    return recorded_shards(record) if is_conversion(record, source, options) else None


def is_conversion(record: Mapping[str, Any], source: Source, options: Options) -> bool:
    """Whether a provenance file is of a conversion of this source with these options."""
    said = record.get("source")
    if not isinstance(said, dict):
        return False
    name = source.name if source.revision else source.name.rstrip("/").rpartition("/")[2]
    is_source = (said.get("name"), said.get("revision"), said.get("bytes")) == (name, source.revision, source.nbytes)
    return is_source and record.get("options") == options.as_dict()


def recorded_shards(record: Mapping[str, Any]) -> dict[str, Finished]:
    """The shards that a provenance file names."""
    shards = record.get("shards")
    entries = shards.items() if isinstance(shards, dict) else ()
    return {
        name: Finished(str(entry.get("sha256")), int(entry.get("bytes", 0)))
        for name, entry in entries
        if isinstance(entry, dict)
    }
