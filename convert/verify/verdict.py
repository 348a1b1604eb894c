"""What a verification found, as data. Reports and exit codes are made of this and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

from xpuquant.errors import DamagedError, one_line
from xpuquant.formats.guard import UNFORESEEN, show

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


@dataclass(frozen=True)
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


class Claim(StrEnum):
    """What may be said of a module whose check found no error. Only `EXACT` may be called exact."""

    EXACT = "exact"
    """Integers and scales are the source's; of an unquantized tensor, the bytes are."""

    ROUNDED = "scales rounded"
    """Integers are the source's, scales are the source's rounded once to another dtype: `Checked.rounding`."""

    DEQUANTIZED = "dequantized"
    """Every bf16 value is the exact product of code and scale, rounded once."""

    RECORDED = "recorded"
    """It decodes to what was recorded at conversion, when it was compared with the source."""


@dataclass(frozen=True)
class Rounding:
    """What rounding the scales of a module changed.

    dtype    what they were rounded to, a safetensors label
    scales   scales of the source that were rounded
    changed  those that have another value now
    largest  largest |change| / |scale| of those
    """

    dtype: str
    scales: int = 0
    changed: int = 0
    largest: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        """Both together; they are of one dtype."""
        scales, changed = self.scales + other.scales, self.changed + other.changed
        return Rounding(self.dtype, scales, changed, max(self.largest, other.largest))


@dataclass(frozen=True)
class Checked:
    """The exactness of one module or one unquantized tensor.

    matrices  matrices compared; 0 for an unquantized tensor
    error     None where everything is as it should be; otherwise the first difference
    digest    of the decoded form (see `convert/verify/digests.py`); None where nothing could be decoded
    claim     what the check shows where there is no error
    rounding  of a module whose scales were rounded: now (`ROUNDED`), or when it was converted (`RECORDED`); None where
              that was not kept
    """

    name: str
    matrices: int
    error: str | None
    digest: str | None = None
    claim: Claim = Claim.EXACT
    rounding: Rounding | None = None


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Health:
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


@dataclass(frozen=True)
class Verdict:
    """A verification.

    repo         the folder's name
    producer     what wrote it
    basis        what exactness was checked against, in words; empty where it was not
    files        files whose sha256 was compared
    exact        modules and unquantized tensors, each with what may be claimed of it
    kernels      every kernel run, and the runs refused
    unavailable  backend → why it cannot run here
    health       module → its numbers
    findings     failures and warnings that are no `Checked` and no `Agreement`
    schemes      module → scheme label
    before       dtype → bytes of the source; empty where unknown
    after        dtype → bytes of the output
    """

    repo: str
    producer: str
    basis: str = ""
    files: int = 0
    exact: Sequence[Checked] = ()
    kernels: Sequence[Agreement] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    health: Mapping[str, Health] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    schemes: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, int] = field(default_factory=dict)
    after: Mapping[str, int] = field(default_factory=dict)

    @property
    def failing(self) -> list[Finding]:
        """Everything that makes the verification fail."""
        wrong = [finding for finding in self.findings if finding.fails]
        wrong += [Finding("exactness", one.name, one.error) for one in self.exact if one.error is not None]
        return wrong + [Finding("kernels", run.module, run.failure()) for run in self.kernels if not run.passed]

    @property
    def failures(self) -> list[str]:
        """One line each."""
        return [finding.line() for finding in self.failing]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.fails]

    @property
    def passed(self) -> bool:
        return not self.failing

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
        """The run that colours a module's cell: one that failed, or the least exact of the most exact dtype of
        activations; real kernels first."""
        runs = self._ran.get(module, [])
        real = [run for run in runs if run.backend != REFERENCE] or runs
        shown = [run for run in real if not run.passed]
        shown = shown or [run for run in real if run.activation == real[0].activation]
        return max(shown, key=lambda run: run.error or 0.0, default=None)

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
                "health": {name: Health(**entry) for name, entry in data["health"].items()},
                "findings": [Finding(**entry) for entry in data["findings"]],
            }
        )


def _checked(entry: Mapping[str, Any]) -> Checked:
    rounding = entry["rounding"]
    return Checked(
        **{
            **entry,
            "claim": Claim(entry["claim"]),
            "rounding": None if rounding is None else Rounding(**rounding),
        }
    )
