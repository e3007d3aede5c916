"""Names that begin with `${PEFT_LAB_DATA}`.

They name the user's own data and backbones in the same way on every machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft_lab.errors import ConfigError, PeftLabError

DATA_VARIABLE = "PEFT_LAB_DATA"
DATA_PREFIX = "${" + DATA_VARIABLE + "}"


def below_data(name: str, what: str, error: type[PeftLabError] = ConfigError) -> Path:
    """Absolute path of a name with a leading `${PEFT_LAB_DATA}`.

    `what` says in errors who reads it.

    Raises:
        ConfigError: the variable is not set; or the error that is given.
    """
    root = os.environ.get(DATA_VARIABLE)
    if not root:
        raise error(f"{what} reads {name}: set the environment variable {DATA_VARIABLE} to that folder.")
    # Path takes a name that begins with a slash as absolute and drops the root
    return Path(root).absolute() / name.removeprefix(DATA_PREFIX).lstrip("/")
