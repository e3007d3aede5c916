"""Kinds of task (one Python file each) and tasks (one YAML file each).

The module is callable: `peft_lab.tasks()` lists the tasks, also after this package was imported under the same name.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft_lab.task import Task


class _Tasks(types.ModuleType):
    def __call__(self) -> dict[str, Task]:
        """Every built-in and third-party task by name."""
        from peft_lab.task import tasks

        return tasks()


sys.modules[__name__].__class__ = _Tasks
