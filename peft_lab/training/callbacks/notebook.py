"""Progress in notebooks: Trainer's table, without splits under a wrong name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import trainer as transformers_trainer
from transformers.utils import is_in_notebook

if TYPE_CHECKING:
    from transformers import Trainer


def name_splits(trainer: Trainer) -> None:
    """Replace Trainer's callback for notebooks, which calls the loss of every split the validation loss.

    Nothing changes outside of notebooks and without progress bars.
    """
    usual: Any = transformers_trainer.DEFAULT_PROGRESS_CALLBACK
    if is_in_notebook() and trainer.pop_callback(usual) is not None:
        trainer.add_callback(_for_notebooks(usual))


def _for_notebooks(usual: Any) -> Any:
    """Class of the callback, made here because its base imports IPython."""

    class NotebookProgress(usual):  # type: ignore[misc]
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if any(name.startswith("eval_") for name in metrics or {}):
                super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
            else:
                self.on_predict(args, state, control, **kwargs)  # closes the bar alone

    return NotebookProgress
