"""Where peft-lab keeps what it can compute again: `$PEFT_LAB_CACHE`, else `peft_lab` beside the Hugging Face cache."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir(*parts: str) -> Path:
    """A folder below the cache root; it is not created. `PEFT_LAB_CACHE` moves the root."""
    root = os.environ.get("PEFT_LAB_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "peft_lab"
    return Path(root).expanduser().joinpath(*parts)
