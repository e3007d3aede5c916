"""Imported first by processes of ours that Python starts with the working directory on the module path.

A script called `evaluate.py` is common, and would be imported in place of the library of that name.
"""

from __future__ import annotations

import os
import sys

if sys.path and sys.path[0] in ("", os.getcwd()) and not getattr(sys.flags, "safe_path", False):
    del sys.path[0]
