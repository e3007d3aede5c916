"""Module form of the `peft-lab` command, for `accelerate launch -m peft_lab`."""

import peft_lab.utils._safe_path  # noqa: F401  first: a user's script may have the name of a library
from peft_lab.cli import main

if __name__ == "__main__":
    main()
