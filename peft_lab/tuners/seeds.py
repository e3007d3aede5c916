"""Seeds of modules, made of an adapter's seed and a module's path."""

from __future__ import annotations

import hashlib


def module_seed(seed: int, path: str) -> int:
    """Seed of a module, below 2 ** 56, that does not depend on the other modules or on their order."""
    digest = hashlib.sha256(f"{seed}/{path}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
