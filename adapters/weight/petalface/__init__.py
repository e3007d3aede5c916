"""PETALface, and `register_quality` to add a score of one's own."""

from peft_lab.adapters.weight.petalface.quality import register_quality

__all__ = ["register_quality"]
