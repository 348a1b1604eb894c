"""The words of the report, for who reads one for the first time: every check and every title of a column."""

from __future__ import annotations

from collections.abc import Mapping

CHECKS: Mapping[str, str] = {
    "integrity": (
        "The files are those that were written: sha256, headers, index and config.json agree. During a conversion "
        "headers and sizes are read again, and the hashes are taken from the bytes as they are written."
    ),
    "exactness": (
        "Every stored value is decoded, by code that shares nothing with the conversion's fast path, and compared with "
        "what the source decodes to, or with what was recorded at conversion. Equal, not close."
    ),
    "kernels": (
        "Kernel libraries compute stored modules; their outputs are compared with a float64 product, and must differ "
        "by no more than rounding explains."
    ),
    "sanity": (
        "Numbers that are the source's and still worth a look: scales of 0, groups that hold only zeros, codes at an "
        "end of their range. They warn; only NaN or infinity that the source has not fails."
    ),
}
"""Check → what it shows."""

COLUMNS: Mapping[str, str] = {
    "Check": "One kind of verification.",
    "Result": "pass, FAIL with the number of failures, not all where something was left out, or not run.",
    "What was looked at": "How much of the model the check covered, and by which means.",
    "Module": "A linear layer or a stack of experts of the model, by its name in the checkpoint.",
    "Of tolerance": (
        "The deviation as a share of the tolerance. Up to 100 % passes. A right kernel uses a part of it, since it "
        "rounds; how large a part says nothing about the quality of the model."
    ),
    "Backend": "The kernel library. reference is float64 arithmetic of our own, which shows how the layout is read.",
    "Scheme": "How the module is stored: layout, number format, and how many columns share a scale (g32: 32).",
    "N": "Output features of the matrix.",
    "K": "Input features of the matrix.",
    "Rows": "How many of the N output features were computed.",
    "M": "Numbers of tokens computed at once. Kernels take other paths for few than for many; figures are the worst.",
    "Acts": "The dtype of the activations: F32, F16 or BF16; the more exact, the smaller an error they show.",
    "Rel. error": "Root of the sum of squares of all errors, over that of all outputs (Frobenius norm).",
    "Deviation": (
        "The largest error of a single output, over that output's magnitude and that of the terms it is the sum of. "
        "This is what is judged."
    ),
    "Tolerance": "The deviation that rounding explains, for this dtype and K. More fails.",
    "SQNR dB": "Signal to noise of all outputs: -20 log10 of the relative error. 120 dB is an error of a millionth.",
    "Max abs": "The largest absolute error of an output.",
    "Cosine": "Cosine of the kernel's outputs and the float64 ones, each as one vector: 1 is the same direction.",
    "Wrong layout": (
        "The deviation when the kernel is given the same weight in a wrong layout. It has to be beyond the tolerance: "
        "otherwise agreement would show nothing."
    ),
    "Scales": "Numbers by which groups of codes are multiplied: how many the module has.",
    "NaN, Inf": "Scales and codes that are no finite number.",
    "Zero": "Scales that are 0: all that they multiply is lost.",
    "Dead groups": "Groups of codes that all mean 0.",
    "Largest / rms scale": "The largest scale over the root mean square of all: real models stay below about 30.",
    "Codes at an end": "The share of codes at the end of their range, where larger values were cut off.",
    "Stored as": "The dtype of tensors in the files. Packed 4-bit codes are I32 or U8 there.",
    "Source": "Bytes in the checkpoint that was converted.",
    "Converted": "Bytes in the files of this repo.",
    "Reason": "Why a kernel library did not run, or not on these modules.",
}
"""Title of a column → what stands in it."""
