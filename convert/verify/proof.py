"""What has been shown of a repo's weights: the one value that every sentence, report and requirement is made of.

A check of a module or tensor ends in a `Checked`, which says what it found and what may be claimed of it. A `Proof` is
the sum of them. Nothing that prints looks at anything else, so that nothing can say more than was shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import field
from enum import StrEnum

from xpuquant.values import frozen


class Claim(StrEnum):
    """What may be said of a module whose check found no error. Only `EXACT` may be called exact."""

    EXACT = "exact"
    """Integers and scales are the source's; of an unquantized tensor, the bytes are."""

    ROUNDED = "scales rounded"
    """Integers are the source's, scales are the source's rounded once to another dtype: `Checked.rounding`."""

    DEQUANTIZED = "dequantized"
    """Every bf16 value is the exact product of code and scale, rounded once: `Checked.rounding`."""

    RECORDED = "recorded"
    """It is what was recorded at conversion, when it was compared with the source: `Checked.recorded`."""

    NOT_CHECKED = "not checked"
    """There was nothing to compare it with."""


@frozen(sealed=True)
class Rounding:
    """What rounding changed in a module.

    dtype    what was rounded to, a safetensors label
    numbers  how many were rounded: scales, or the values of a dequantized matrix
    changed  those that have another value now
    largest  largest |change| / |number| of those
    """

    dtype: str
    numbers: int = 0
    changed: int = 0
    largest: float = 0.0

    def __add__(self, other: Rounding) -> Rounding:
        """Both together; they are of one dtype."""
        numbers, changed = self.numbers + other.numbers, self.changed + other.changed
        return Rounding(self.dtype, numbers, changed, max(self.largest, other.largest))


@frozen(sealed=True)
class Checked:
    """The exactness of one module, one dequantized matrix, or one unquantized tensor.

    matrices  matrices compared; 0 for an unquantized tensor
    error     None where everything is as it should be; otherwise the first difference
    digest    of the decoded form (see `convert/verify/digests.py`), or of the tensor's bytes; None where nothing could
              be decoded, or there is none to compare with
    claim     what the check shows where there is no error
    rounding  what was rounded, now (`ROUNDED`, `DEQUANTIZED`) or when it was converted (`RECORDED`); None where nothing
              was, or that was not kept
    recorded  of `RECORDED`: what the comparison with the source showed at conversion
    """

    name: str
    matrices: int
    error: str | None
    digest: str | None = None
    claim: Claim = Claim.EXACT
    rounding: Rounding | None = None
    recorded: Claim | None = None

    @property
    def is_of_source(self) -> bool:
        """Whether its numbers have been found to be the source's, now or at conversion."""
        return self.error is None and self.claim is not Claim.NOT_CHECKED

    @property
    def lost(self) -> Claim | None:
        """`ROUNDED` or `DEQUANTIZED`, now or at conversion; None of what is exact or was not checked."""
        held = self.recorded if self.claim is Claim.RECORDED else self.claim
        return held if held in (Claim.ROUNDED, Claim.DEQUANTIZED) else None


@frozen(sealed=True)
class Proven:
    """Matrices of which the same may be said.

    rounding  what was rounded in all of them together; None as in `Checked`
    """

    claim: Claim
    recorded: Claim | None
    matrices: int
    rounding: Rounding | None = None


@frozen(sealed=True)
class Proof:
    """What has been shown of all weights.

    parts    matrices without a difference, by what may be said of them, in the order of `Claim`
    wrong    modules and tensors in which a difference was found
    tensors  unquantized tensors without a difference: claim → how many
    """

    parts: tuple[Proven, ...] = ()
    wrong: int = 0
    tensors: Mapping[Claim, int] = field(default_factory=dict)

    @classmethod
    def of(cls, checked: Iterable[Checked]) -> Proof:
        """The sum of what was found."""
        wrong, tensors = 0, Counter[Claim]()
        matrices = Counter[tuple[Claim, Claim | None, str]]()
        roundings: dict[tuple[Claim, Claim | None, str], Rounding] = {}
        for one in checked:
            if one.error is not None:
                wrong += 1
            elif not one.matrices:
                tensors[one.claim] += 1
            else:
                key = (one.claim, one.recorded, one.rounding.dtype if one.rounding else "")
                matrices[key] += one.matrices
                if one.rounding is not None:
                    roundings[key] = roundings.get(key, Rounding(one.rounding.dtype)) + one.rounding
        order = list(Claim)
        keys = sorted(matrices, key=lambda key: (order.index(key[0]), order.index(key[1] or Claim.EXACT), key[2]))
        parts = [
            Proven(claim, held, matrices[claim, held, to], roundings.get((claim, held, to))) for claim, held, to in keys
        ]
        return cls(tuple(parts), wrong, dict(tensors))

    @classmethod
    def none(cls, matrices: int, tensors: int) -> Proof:
        """Of a conversion that was not verified."""
        return cls((Proven(Claim.NOT_CHECKED, None, matrices),), 0, {Claim.NOT_CHECKED: tensors})

    def matrices(self, claim: Claim) -> int:
        """How many matrices have that claim."""
        return sum(part.matrices for part in self.parts if part.claim is claim)
