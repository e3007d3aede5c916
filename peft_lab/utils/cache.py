"""Cache folder of peft-lab, for files that it can compute again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """Folder below the cache root; it is not created.

    The root is `$PEFT_LAB_CACHE`, else `peft_lab` beside the Hugging Face cache.
    """
    root = os.environ.get("PEFT_LAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_lab"
    return Path(root).expanduser().joinpath(*parts)
