"""Files that are called like secrets: keys, tokens, passwords. By name alone: what is in them is not read.

Whatever no rule leaves out of a source is copied, and what a folder holds is published. Hidden files (`.netrc`, `.env`)
are left out of both; these lie in plain sight, mostly because a shell was opened in the wrong folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_SECRET = re.compile(
    r"id_(rsa|dsa|ecdsa|ed25519)(_sk)?|_?netrc|(hf_?|access_?|api_?|auth_?)?tokens?(\.txt)?|"
    r"(aws_?)?credentials?(\.(json|ini|txt|csv|ya?ml))?|secrets?(\.(json|txt|ya?ml|toml|env))?|passwords?(\.txt)?|"
    r"service_?account[\w-]*\.json|client_secret[\w.-]*\.json|kubeconfig|htpasswd|.*\.(env|pem|key|p12|pfx|jks|ppk|kdbx)",
    re.IGNORECASE,
)
"""Names that ssh, OpenSSL, the Hub's client, cloud clients and shells give to secrets. No file of a model has one:
`tokenizer.json`, `special_tokens_map.json` and `added_tokens.json` are others."""

_MOST = 20


def secret_notes(names: Iterable[str], becomes: str) -> list[str]:
    """A remark on each file that is called like a secret.

    Args:
        names: relative POSIX paths.
        becomes: what is done with the file, in words.
    """
    found = [name for name in names if _SECRET.fullmatch(PurePosixPath(name).name)]
    notes = [f"{name} is called like a secret, and is {becomes}: move it away if it is one" for name in found[:_MOST]]
    return notes + [f"{len(found) - _MOST} more are called like secrets"] * (len(found) > _MOST)
