"""What a verification found, as data. Reports and exit codes are made of this and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from xpuquant.conversion.sizes import counted
from xpuquant.conversion.verify.proof import Checked, Claim, Proof, Rounding
from xpuquant.conversion.verify.setting import Setting
from xpuquant.errors import DamagedError, one_line
from xpuquant.formats.guard import UNFORESEEN, show
from xpuquant.values import frozen

REFERENCE = "reference"
"""The float64 backend: it checks that the layout means what it should, not that a real kernel reads it so."""

CONTRADICTIONS = (DamagedError, *UNFORESEEN)
"""What decoding and computing raise where config and tensors contradict each other: a finding, not a crash."""


def contradiction(error: Exception) -> str:
    """What is wrong, on one line."""
    if isinstance(error, DamagedError):
        return str(error)
    show(error)
    return one_line(f"its tensors are not what config.json says ({type(error).__name__}: {error})")


@frozen(sealed=True)
class Finding:
    """Something a person should know.

    check  which check found it: `integrity`, `exactness`, `kernels`, `sanity`
    where  file, tensor or module
    fails  whether it makes the verification fail; otherwise it is a warning
    """

    check: str
    where: str
    what: str
    fails: bool = True

    def line(self) -> str:
        return f"{self.check}: {self.where}: {self.what}"


@frozen(sealed=True)
class Agreement:
    """One kernel on one matrix, against the float64 product.

    role, expert  which matrix of the module; see `Matrix` in `formats/layouts/base.py`
    scheme        its label
    rows          output features computed, of N
    M             numbers of activation rows; figures are the worst over them
    activation    dtype of the activations: `F32`, `F16`, `BF16`
    error         relative Frobenius error; None where it was not run
    deviation     largest error of an output, over its magnitude and that of its terms (`Expected.size`)
    max_abs       largest absolute error
    cosine        cosine of the two products, as one vector
    tolerance     the deviation that passes
    wrong_layout  deviation when the kernel is given the same weight in a wrong layout: it must not pass;
                  None where that was not tried or could not show
    reason        why it was not run
    histogram     counts of |error| / rms(product), by power of ten: see `BINS` in `convert/verify/agreement.py`
    """

    backend: str
    module: str
    role: str
    expert: int | None
    scheme: str
    N: int
    K: int
    rows: int = 0
    M: tuple[int, ...] = ()
    activation: str = ""
    error: float | None = None
    deviation: float = math.inf
    max_abs: float = 0.0
    cosine: float = 1.0
    tolerance: float = 0.0
    wrong_layout: float | None = None
    reason: str | None = None
    histogram: tuple[int, ...] = ()

    @property
    def ran(self) -> bool:
        return self.error is not None

    @property
    def blind(self) -> bool:
        """A wrong layout passed: the check shows nothing."""
        return self.wrong_layout is not None and self.wrong_layout <= self.tolerance

    @property
    def passed(self) -> bool:
        return self.error is None or (self.deviation <= self.tolerance and not self.blind)

    @property
    def used(self) -> float | None:
        """The deviation as a share of the tolerance: 1 is the most that passes, and infinite what is not a number. None
        where it did not run."""
        if self.error is None:
            return None
        share = self.deviation / self.tolerance if self.tolerance else math.inf
        return math.inf if math.isnan(share) else share

    @property
    def sqnr_db(self) -> float | None:
        """Signal to noise of the kernel's output in dB; infinite where it is equal to the last bit."""
        if self.error is None or math.isnan(self.error):
            return None
        return math.inf if self.error == 0 else -20 * math.log10(self.error)

    def failure(self) -> str:
        """Why it did not pass."""
        if self.reason is not None:
            return f"kernel '{self.backend}': {self.reason}"
        if self.blind:
            return (
                f"kernel '{self.backend}' accepts a wrong layout (deviation {self.wrong_layout:.1e}): "
                "its agreement shows nothing"
            )
        return (
            f"kernel '{self.backend}' ({self.activation}) is off by {self.deviation:.1e} of an output "
            f"and its terms, at most {self.tolerance:.0e} is rounding"
        )


@frozen(sealed=True)
class Sanity:
    """What a deployer may want to know about one module's numbers.

    groups          scales of the module
    bad_scales      NaN or infinite ones; `zero_scales` are 0
    dead_groups     groups whose codes all mean 0
    codes           elements looked at for saturation: one row in four
    saturated       of those, the ones at either end of their range
    bad_codes       float codes that are NaN or infinite
    scale_max       largest |scale|, and `scale_typical`, the root mean square of the finite ones
    """

    groups: int = 0
    bad_scales: int = 0
    zero_scales: int = 0
    dead_groups: int = 0
    codes: int = 0
    saturated: int = 0
    bad_codes: int = 0
    scale_max: float = 0.0
    scale_typical: float = 0.0


class Outcome(StrEnum):
    """The three verdicts. A check that did not run is not a pass."""

    VERIFIED = "verified"
    """Everything was compared, with the source or with what was recorded at conversion, and found as it should be."""

    FAILED = "failed"
    """Something is not as it should be."""

    NOT_VERIFIED = "not verified"
    """Nothing wrong was found, but not everything that had to be was checked."""


@frozen(sealed=True)
class Demands:
    """What a verification has to show beyond what it always does.

    exact     every value is the source's, none rounded, by comparison with the source itself
    backends  kernel libraries that were named: each has to run here and compute something
    required  kernel libraries of which each has to compute every module
    """

    exact: bool = False
    backends: tuple[str, ...] = ()
    required: tuple[str, ...] = ()


NO_DEMANDS = Demands()


@frozen(sealed=True)
class Verdict:
    """A verification.

    repo         the folder's name
    producer     what wrote it
    basis        what exactness was checked against, in words; empty where it was not
    files        files whose sha256 was compared
    shards       shards whose headers and sizes, read again after they were written, are those planned
    exact        modules and unquantized tensors, each with what may be claimed of it
    kernels      every kernel run, and the runs refused
    unavailable  backend → why it cannot run here
    sanity       module → its numbers
    findings     failures and warnings that are no `Checked` and no `Agreement`
    schemes      module → scheme label
    before       dtype → bytes of the source; empty where unknown
    after        dtype → bytes of the output
    demands      what it had to show
    model        what config.json calls the model; empty where it was not read
    source       what it was converted from: a repo and its commit, or a folder's name; empty where unknown
    setting      when, where and with which versions; None where nobody noted it
    """

    repo: str
    producer: str
    basis: str = ""
    files: int = 0
    shards: int = 0
    exact: Sequence[Checked] = ()
    kernels: Sequence[Agreement] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    sanity: Mapping[str, Sanity] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    schemes: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)
    demands: Demands = NO_DEMANDS
    model: str = ""
    source: str = ""
    setting: Setting | None = None

    @cached_property
    def proof(self) -> Proof:
        """What has been shown of the weights."""
        return Proof.of(self.exact)

    @cached_property
    def failing(self) -> Sequence[Finding]:
        """Everything that makes the verification fail."""
        wrong = [finding for finding in self.findings if finding.fails]
        wrong += [Finding("exactness", one.name, one.error) for one in self.exact if one.error is not None]
        wrong += [Finding("kernels", run.module, run.failure()) for run in self.kernels if not run.passed]
        if self.demands.exact:
            inexact = [(one.name, one.lost) for one in self.exact if one.error is None and one.lost is not None]
            wrong += [
                Finding("exactness", name, f"{lost}, where every value has to be the source's")
                for name, lost in inexact
            ]
        return wrong

    @cached_property
    def gaps(self) -> Sequence[Finding]:
        """Everything that had to be checked and was not. Empty where nothing failed before it could be."""
        return [*self._not_compared(), *self._not_computed()]

    @property
    def failures(self) -> list[str]:
        """One line each."""
        return [finding.line() for finding in self.failing]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.fails]

    @property
    def outcome(self) -> Outcome:
        """Verified, failed, or not verified."""
        if self.failing:
            return Outcome.FAILED
        return Outcome.NOT_VERIFIED if self.gaps else Outcome.VERIFIED

    @property
    def passed(self) -> bool:
        """Whether it is verified: nothing failed, and nothing that had to be checked was left out."""
        return self.outcome is Outcome.VERIFIED

    def _not_compared(self) -> Iterator[Finding]:
        matrices, tensors = self.proof.matrices(Claim.NOT_CHECKED), self.proof.tensors.get(Claim.NOT_CHECKED, 0)
        if matrices or tensors:
            what = (
                f"{counted(matrices, 'matrix', 'matrices')} and {counted(tensors, 'unquantized tensor')} have no "
                "recorded digest and were compared with nothing, as after a conversion without verification; verify "
                "against the source to check them"
            )
            yield Finding("exactness", self.repo, what, fails=False)
        if not self.exact:
            yield Finding("exactness", self.repo, "no weight was compared with anything", fails=False)
        if self.demands.exact and any(one.claim is Claim.RECORDED for one in self.exact):
            what = "compared with its own record only; to be shown exact it has to be compared with the source"
            yield Finding("exactness", self.repo, what, fails=False)

    def _not_computed(self) -> Iterator[Finding]:
        # The reference is no kernel library: naming it asks for nothing.
        named = [backend for backend in self.demands.backends if backend != REFERENCE]
        for backend in dict.fromkeys((*named, *self.demands.required)):
            computed = {run.module for run in self.kernels if run.ran and run.backend == backend}
            left = [name for name in self.schemes if name not in computed]
            every = backend in self.demands.required
            if backend not in self.unavailable and (not left or (computed and not every)):
                continue
            refused = (run.reason for run in self.kernels if run.backend == backend and not run.ran and run.reason)
            why = self.unavailable.get(backend) or next(refused, None)
            what = f"computed {len(computed)} of {counted(len(self.schemes), 'module')}"
            what += f": {why}" if why else f", among others not {left[0]}"
            yield Finding("kernels", backend, what, fails=False)

    @property
    def unchecked(self) -> list[str]:
        """Modules that no real kernel computed here."""
        computed = {run.module for run in self.kernels if run.ran and run.backend != REFERENCE}
        return [name for name in self.schemes if name not in computed]

    @cached_property
    def _ran(self) -> dict[str, list[Agreement]]:
        """Module → its runs. Looked up per module: with ten thousand of them, a list is too slow."""
        by_module: dict[str, list[Agreement]] = {}
        for run in self.kernels:
            if run.ran:
                by_module.setdefault(run.module, []).append(run)
        return by_module

    def cell(self, module: str) -> Agreement | None:
        """The run that colours a module's cell: the one nearest to its tolerance or farthest beyond it, of those that
        failed where some did; real kernels first."""
        runs = self._ran.get(module, [])
        real = [run for run in runs if run.backend != REFERENCE] or runs
        shown = [run for run in real if not run.passed] or real
        return max(shown, key=lambda run: run.used or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON objects, for `from_json`. verify.json is another, made for readers."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` made this of. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            **{
                **data,
                "exact": [_checked(entry) for entry in data["exact"]],
                "kernels": [
                    Agreement(**{**entry, "M": tuple(entry["M"]), "histogram": tuple(entry["histogram"])})
                    for entry in data["kernels"]
                ],
                "sanity": {name: Sanity(**entry) for name, entry in data["sanity"].items()},
                "findings": [Finding(**entry) for entry in data["findings"]],
                "demands": Demands(**{key: _tuples(value) for key, value in data["demands"].items()}),
                "setting": None if data["setting"] is None else Setting(**data["setting"]),
            }
        )


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _checked(entry: Mapping[str, Any]) -> Checked:
    rounding, recorded = entry["rounding"], entry["recorded"]
    return Checked(
        **{
            **entry,
            "claim": Claim(entry["claim"]),
            "rounding": None if rounding is None else Rounding(**rounding),
            "recorded": None if recorded is None else Claim(recorded),
        }
    )
