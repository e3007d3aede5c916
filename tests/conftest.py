"""Settings for the whole suite, set before torch is imported and inherited by the processes that tests start."""

from __future__ import annotations

import os

# Two workers with two threads each on two cores would spend their time waiting for one another.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
