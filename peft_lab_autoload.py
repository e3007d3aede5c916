"""Hook by which `import torch` makes the methods known to peft, without `import peft_lab`.

PyTorch calls every entry point of the group `torch.backends` at the end of its import. The group is made for device
backends; here it carries the registration of peft-lab's methods, so that transformers, peft and what is built on them
load an adapter of peft-lab as they load one of LoRA. An entry point that fails makes `import torch` fail. So this
module stands outside of the package, imports the standard library alone, and reports errors instead of raising them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

#: Environment variable that switches the hook off by any value but 1, as PyTorch's own switch for all hooks does.
SWITCH = "PEFT_LAB_AUTOLOAD"

logger = logging.getLogger(__name__)


def register() -> None:
    """Register the methods at the import of peft, or log in one line why that is impossible."""
    # a program that has imported the package itself gets its errors as exceptions
    if os.environ.get(SWITCH, "1") != "1" or "peft_lab" in sys.modules:
        return
    try:
        _check_is_ours()
        from peft_lab import _register_on_import

        _register_on_import.report_errors(report)
    except Exception as error:  # `import torch` would fail with it
        report(error)


def report(error: BaseException) -> None:
    """Log in one line why the methods are not registered, and the mend."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    logger.warning(
        "peft-lab cannot register its methods with peft (%s): adapters of peft-lab do not load here. `peft-lab doctor` "
        "says more; %s=0 switches the registration off.",
        *(reason, SWITCH),
    )


def _check_is_ours() -> None:
    """Check that the name `peft_lab` leads to this package, before any code of it is run.

    Raises:
        ImportError: it leads to nothing, or to another file or folder, such as a script of that name.
    """
    found = importlib.util.find_spec("peft_lab")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    if not any(Path(folder, "_register_on_import.py").is_file() for folder in folders):
        where = (found.origin or ", ".join(folders)) if found is not None else "nothing"
        raise ImportError(f'the name "peft_lab" leads to {where}, which hides the installed package')
