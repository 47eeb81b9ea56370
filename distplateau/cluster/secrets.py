"""What must not get into a run folder, a batch script or a pickle: names that sound like keys, and keys themselves."""

from __future__ import annotations

import fnmatch
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

# What holds keys by custom. Many folders have one that is not ignored, and a run folder is shown around.
SECRET_FILES = (
    ".env", ".env.*", ".envrc", ".netrc", ".npmrc", ".pypirc", "*.pem", "*.key",
    "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "credentials.json",
)  # fmt: skip
# Whole words between underscores: NCCL_IB_PKEY and TOKENIZERS_PARALLELISM are no secrets.
_SECRET = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|PRIVATE|SECRET|AUTH)?KEY|(?:AUTH)?TOKEN|PAT|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASS|PW"
    r"|CREDENTIALS?)S?(?:$|_)",
    re.IGNORECASE,
)
# A shorter value is found in many a text that has nothing to do with it.
_SHORTEST = 8


def looks_secret(name: str) -> bool:
    """Return whether a variable of that name holds what nobody else must see."""
    return _SECRET.search(name.replace("-", "_")) is not None


def is_secret_file(path: Path) -> bool:
    """Return whether a file of that name holds keys by custom."""
    return any(fnmatch.fnmatchcase(path.name, pattern) for pattern in SECRET_FILES)


def secret_in(content: bytes, environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the name of a variable of this shell whose secret value stands in a text, None if none does."""
    for name, value in environ.items():
        if looks_secret(name) and len(value) >= _SHORTEST and value.encode(errors="surrogateescape") in content:
            return name
    return None
