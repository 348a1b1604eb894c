"""Every argument and option of the command line, once: its type, its limits, its help.

A parameter of a command is called like the argument of the function in `xpuquant.api` that it stands for: errors are
spelt for both (`cli/spelling.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from xpuquant.conversion.options import LAYOUT_FAMILIES, ON_UNSUPPORTED, ROUNDED_TO

_DTYPES = ("keep", *ROUNDED_TO.values())


def _completes(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """What a shell offers for an option that takes one of a few words."""

    def completed(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return completed


_SOURCE = "Folder with a quantized checkpoint, or OWNER/NAME or OWNER/NAME@REVISION on the Hub."

SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help=_SOURCE)]
ToConvertArgument = Annotated[str | None, typer.Argument(metavar="SRC", help=_SOURCE)]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="FILE",
        help="Convert every source that FILE lists, a line each: SRC, or SRC OUT. With -o, into that folder. "
        "One that fails stops none of the others. - is standard input.",
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of SRC on the Hub (default: main).")
]
OutToWriteArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="OUT",
        help="Folder to write (default: the name of SRC with -xpu or -compressed-tensors, in the current folder).",
    ),
]
OutOption = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="The same as OUT.")]
OutOfPartsArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder the parts were written to.")]
OutConvertedArgument = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that `convert` wrote.")]

OutCheckedArgument = Annotated[
    str,
    typer.Argument(
        metavar="OUT",
        help="Folder that `convert` wrote, or a converted repo on the Hub: OWNER/NAME or OWNER/NAME@REVISION.",
    ),
]

# What changes the bytes of the output.
LayoutOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(LAYOUT_FAMILIES),
        autocompletion=_completes(LAYOUT_FAMILIES),
        help="Layout to write: for XPU kernels, or for stock loaders.",
    ),
]
ScaleDtypeOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(_DTYPES),
        autocompletion=_completes(_DTYPES),
        help="Keep the scales as they are in SRC, or round them.",
    ),
]
OnUnsupportedOption = Annotated[
    str,
    typer.Option(
        metavar="|".join(ON_UNSUPPORTED),
        autocompletion=_completes(ON_UNSUPPORTED),
        help="What becomes of modules that no XPU kernel takes; dequantized, they are bf16.",
    ),
]
MaxShardSizeOption = Annotated[str, typer.Option(metavar="SIZE", help="Largest output file, e.g. 5GB or 512MiB.")]
FoldActOrderOption = Annotated[
    bool,
    typer.Option(
        "--fold-act-order",
        help="Store an MLP's rows in the order its act-order down_proj wants: exact, and no permutation at run time. "
        "Adapters trained on the source no longer fit.",
    ),
]

# `finish` was once told them again. It knows them from the parts' journals; what is given must agree.
SameTextOption = Annotated[str | None, typer.Option(hidden=True)]
SameFlagOption = Annotated[bool | None, typer.Option("--fold-act-order", hidden=True)]

# How it runs.
JobsOption = Annotated[
    int,
    typer.Option(min=0, max=256, show_default=False, metavar="N", help="Workers (default: one per core, at most 8)."),
]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Check every value of the output.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an earlier conversion in OUT.")]
RayOption = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: its address, auto, or local.")
]
PartOption = Annotated[
    str | None,
    typer.Option("--part", "--shard", metavar="I/N", help="Make only part i of n; `finish` puts parts together."),
]
StreamOption = Annotated[
    bool,
    typer.Option("--stream", help="Keep only the shards of SRC in use; with --push-to, of the output too."),
]
TensorParallelOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tp",
        "--tensor-parallel",
        metavar="N,...",
        help="Numbers of GPUs to split the model over (default: 1,2,4,8).",
    ),
]

ModuleArgument = Annotated[
    str, typer.Argument(metavar="MODULE", help="Name of a module of SRC, or of a tensor or an expert of it.")
]
ContextOption = Annotated[
    int, typer.Option(min=1, metavar="TOKENS", help="Length of the sequence whose KV cache is counted.")
]

# How it answers: all commands have these.
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print the answer in one line, and no progress.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Print every row of every table.")]

# Where it is published.
RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub; created if it is not there.")]
PushToOption = Annotated[str | None, typer.Option(metavar="REPO", help="Publish the result on the Hub as OWNER/NAME.")]
PrivateOption = Annotated[bool, typer.Option("--private/--public", help="Of a repository that is created.")]
BranchOption = Annotated[str | None, typer.Option(metavar="BRANCH", help="Push to this branch; created from main.")]
UnverifiedOption = Annotated[
    bool, typer.Option("--unverified", help="Publish also what was converted with --no-verify.")
]
PullRequestOption = Annotated[bool, typer.Option("--pr", help="Push to a pull request; a later push adds to it.")]

# What its card says of the model.
BaseModelOption = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="What the card calls the base: OWNER/NAME on the Hub that SRC is a copy of."),
]
LicenseOption = Annotated[
    str | None, typer.Option(metavar="ID", help="License in the card, as the Hub names it: apache-2.0, mit, other.")
]
LanguageOption = Annotated[str | None, typer.Option(metavar="CODE,...", help="Languages in the card: en, or en,zh.")]

# How it is checked.
CheckedSourceOption = Annotated[
    str | None,
    typer.Option(metavar="SRC", help="What it was converted from. Without it: the digests recorded at conversion."),
]
CheckedRevisionOption = Annotated[
    str | None, typer.Option(metavar="REVISION", help="Branch, tag or commit of a --source on the Hub.")
]
BackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="NAME",
        help="Kernel library that has to run; repeat it for more (default: all that run here).",
    ),
]
EveryOption = Annotated[bool, typer.Option("--all", help="Run kernels on every matrix, all rows and all M.")]
RequireExactOption = Annotated[
    bool,
    typer.Option("--require-exact", help="Fail where a value was rounded or dequantized; wants --source."),
]
RequireBackendsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--require-backend", metavar="NAME", help="Kernel library that has to compute every module; repeat it for more."
    ),
]
ReportOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder to write verify.json, .md, .html and .svg into.")
]
FirstArgument = Annotated[
    str,
    typer.Argument(
        metavar="A",
        help="Folder with safetensors, a .safetensors file, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.",
    ),
]
SecondArgument = Annotated[str, typer.Argument(metavar="B", help="The other one.")]
ValuesOption = Annotated[
    bool, typer.Option("--values/--no-values", help="Compare bytes, or only names, dtypes and shapes.")
]
DecodeOption = Annotated[
    bool,
    typer.Option(
        "--decode/--no-decode", help="Compare the values of modules that the two store otherwise, or only bytes."
    ),
]
