"""Files in a repo that its conversion did not write: which of them a loader would run, unpickle or read.

Those fail a verification by their names, wherever they lie: a hidden folder is on nobody's screen, but Python imports
`__pycache__/x.pyc`, and a path in a config reaches everything. Other files (notes, evaluations, pictures) only warn.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from xpuquant.conversion.walk import is_hidden
from xpuquant.errors import EnvironmentFault, UsageError

UNPROTECTED = ("README.md", ".gitattributes", ".gitignore")
"""Files that may differ: the card, which is edited, and what hosting adds."""

_CODE = re.compile(r"\.(py[a-z]?|pth|so(\.\d+)*|dylib|dll|exe|jar|wasm|sh|ipynb)$", re.IGNORECASE)
_PICKLED = re.compile(
    r"\.(bin|pt|pt2|pth|ckpt|pkl|pickle|p|joblib|dill|cloudpickle|npy|npz|mar|nemo|model_state|distcp)$", re.IGNORECASE
)
_WEIGHTS = re.compile(
    r"\.(safetensors|index\.json|gguf|ggml|h5|hdf5|keras|onnx|onnx_data|msgpack|tflite|pb|engine|mlmodel)$",
    re.IGNORECASE,
)
_READ = re.compile(
    r"(.*\.jinja|chat_template\b.*|adapter_config\.json|adapter_model\b.*|generation_config\.json|config\.json|"
    r"config_[\w-]+\.json|configuration\.json|hf_quant_config\.json|quantize_config\.json|quant_config\.json|"
    r"quantization_config\.json|tokenizer\b.*|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|"
    r"vocab\..*|merges\.txt|spiece\.model|.*\.tiktoken|.*\.model|tekken\.json|params\.json|consolidated\b.*|"
    r"(pre)?processor_config\.json|video_preprocessor_config\.json|feature_extractor\b.*|image_processor\b.*|"
    r"model_index\.json|modules\.json|sentence_bert_config\.json|.*\.gbnf)",
    re.IGNORECASE,
)
"""Names that Transformers and vLLM look for: in the folder itself, templates also below it."""

_MOST_FILES = 200_000
_BRANCHES = (".git/refs/", ".git/logs/")
"""Files here are called like branches and tags; they hold commit ids."""


def loadable(name: str) -> str | None:
    """What a loader would do with a file of that name, in words; None for one it does not look at.

    Args:
        name: relative POSIX path.
    """
    path = PurePosixPath(name)
    if name.startswith(_BRANCHES):
        return None
    if is_pickle(name):
        return "a loader may unpickle it, which runs what it says"
    if _CODE.search(path.name):
        return "it is code that may be run"
    if is_hidden(name):
        return None
    if _WEIGHTS.search(path.name):
        return "a loader may take weights from it"
    in_place = (
        len(path.parts) == 1 or path.suffix.lower() == ".jinja" or path.parent.name == "additional_chat_templates"
    )
    return "a loader may read it" if in_place and _READ.fullmatch(path.name) else None


def is_pickle(name: str) -> bool:
    """Whether a file of that name holds pickled objects, or may. No conversion writes one."""
    return _PICKLED.search(PurePosixPath(name).name) is not None


def hidden_files(folder: Path) -> Iterator[str]:
    """Names of the files that are hidden or in hidden folders (`tree.is_hidden`), relative POSIX paths. They are no
    part of a model, not listed, hashed or published; they must still not be code or a pickle. Links are named, not
    followed; nothing is opened.

    Raises:
        UsageError: more files than a model folder can have. EnvironmentFault: a folder that cannot be read.
    """
    pending, count = [folder], 0
    while pending:
        place = pending.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError as error:
            raise EnvironmentFault(f"{place}: cannot be read ({error.strerror})") from error
        for entry in entries:
            count += 1
            if count > _MOST_FILES:
                raise UsageError(f"{folder}: holds more than {_MOST_FILES} files; is it a model folder?")
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            elif is_hidden(name := Path(entry.path).relative_to(folder).as_posix()):
                yield name
