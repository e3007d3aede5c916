"""`python -m peft_lab`: the same as the `peft-lab` command, so that `accelerate launch -m peft_lab` works."""

import peft_lab.utils._safe_path  # noqa: F401  before anything that is imported by a name which a user's script may have
from peft_lab.cli.main import main

if __name__ == "__main__":
    main()
