"""Folder of what peft-lab can compute again.

It is `$PEFT_LAB_CACHE`, else `peft_lab` beside the Hugging Face cache.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """Path of a folder below the cache root, which is not created."""
    root = os.environ.get("PEFT_LAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_lab"
    return Path(root).expanduser().joinpath(*parts)
