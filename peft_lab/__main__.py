"""`python -m peft_lab`: the same as the `peft-lab` command, so that `accelerate launch -m peft_lab` works."""

from peft_lab.cli import main

if __name__ == "__main__":
    main()
