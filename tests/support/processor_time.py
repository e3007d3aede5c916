"""Limits of processor time, which a slower machine may exceed by as much as it is slower."""

from __future__ import annotations

import os
import subprocess
import sys

#: Imports, Python and small products of matrices, as a command of this project has them.
_WORK = """
import torch, transformers
layer = torch.nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
rows = torch.randn(16, 64, 128)
for _ in range(40):
    layer(rows).sum().backward()
"""
#: Seconds of that work on the machine on which limits were set: half of 7.3 where all tests took twice as long.
_SECONDS_OF_WORK = 3.7


def keeps_limit(used: float, limit: float) -> bool:
    """Test whether processor time keeps a limit.

    Args:
        used: seconds that something took here.
        limit: seconds that it may take on the machine on which limits are set. If they are exceeded, a fixed piece of
            work is timed, and the limit grows by as much as this machine is slower now.
    """
    return used < limit or used < limit * max(1.0, cpu_seconds(_WORK) / _SECONDS_OF_WORK)


def cpu_seconds(script: str) -> float:
    """Seconds of processor time of a fresh interpreter that runs a script, with the processor's own products."""
    script += "\nimport resource\nused = resource.getrusage(resource.RUSAGE_SELF)\nprint(used.ru_utime + used.ru_stime)"
    env = {key: value for key, value in os.environ.items() if key != "MKL_CBWR"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=True)
    return float(done.stdout)
