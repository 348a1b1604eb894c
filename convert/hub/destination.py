"""Where on the Hub a conversion is published, as it was asked for: looked at before the work, without a client."""

from __future__ import annotations

import re

from xpuquant.errors import Argument, UsageError, shown
from xpuquant.values import frozen

_REPO_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


@frozen
class Destination:
    """Where a conversion is published, as it was asked for.

    repo_id     `owner/name`; created where it is not there
    private     of a repository that is created
    branch      push there; it is created from main
    pr          push to a pull request
    unverified  also what was never verified

    Raises:
        UsageError: no repo id; both `branch` and `pr`.
    """

    repo_id: str
    private: bool = True
    branch: str | None = None
    pr: bool = False
    unverified: bool = False

    def __post_init__(self) -> None:
        if _REPO_ID.fullmatch(self.repo_id) is None:
            raise UsageError(f"{shown(self.repo_id)}: not a repo id like owner/name")
        if "/" not in self.repo_id:
            raise UsageError(f"{shown(self.repo_id)}: names no owner; want owner/name, for example you/{self.repo_id}")
        if self.branch is not None and self.pr:
            raise UsageError(
                Argument("branch"), " and ", Argument("pr"), " exclude each other: a pull request is against main"
            )

    @classmethod
    def asked(
        cls, push_to: str | None, private: bool, branch: str | None, pr: bool, unverified: bool
    ) -> Destination | None:
        """Where to publish, of arguments that ask for it only with `push_to`.

        Raises:
            UsageError: the others without it.
        """
        if push_to is not None:
            return cls(push_to, private, branch, pr, unverified)
        given = {"private": private is False, "branch": branch is not None, "pr": pr, "unverified": unverified}
        for name in (name for name, is_given in given.items() if is_given):
            shown_as = Argument(name, False) if name == "private" else Argument(name)
            raise UsageError(shown_as, " is about publishing: give ", Argument("push_to"), " too")
        return None

    def check_verified(self, verify: bool) -> None:
        """Raises UsageError where a conversion would be published that nothing checks, and that was not asked for."""
        if not verify and not self.unverified:
            raise UsageError(
                Argument("push_to", self.repo_id),
                " with ",
                Argument("verify", False),
                " publishes what nothing has checked: add ",
                Argument("unverified", True),
            )

    def check_source(self, name: str) -> None:
        """Raises UsageError where a conversion would overwrite the repository it comes from."""
        if self.repo_id == name and self.branch is None and not self.pr:
            raise UsageError(
                Argument("push_to", name),
                " would replace the source; push to another repository, to a branch (",
                Argument("branch"),
                ") or to a pull request (",
                Argument("pr", True),
                ")",
            )
