"""Removal of the working directory from the module path.

Python puts it there in `python -m` and in child processes, which import this module first. A script called
`evaluate.py` is common, and would be imported in place of the library of that name.
"""

from __future__ import annotations

import os
import sys

if sys.path and sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]
