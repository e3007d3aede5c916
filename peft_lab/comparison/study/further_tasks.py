"""Further tasks of a study, on which final runs are measured, and what they must be."""

from __future__ import annotations

from peft_lab.data.task_registry import kind as task_kind
from peft_lab.data.task_registry import validate_task
from peft_lab.data.task_schema import Task
from peft_lab.errors import ConfigError


def check_further(label: str, task: Task, shifted: str, control: str, ood: str) -> None:
    """Check that the further tasks exist and suit the measures.

    They must be of the same kind and have the labels or rows that are needed.
    """
    for key, source in (("shifted", shifted), ("control", control), ("ood", ood)):
        if not source:
            continue
        other = validate_task(source)
        if other.kind != task.kind:
            raise ConfigError(
                f'The {key} task "{other.name}" of task "{label}" is of kind {other.kind}, not {task.kind}.'
            )
        if key == "control" and not (task.has_classes or task_kind(task.kind).predicts_tokens):
            what = "a regression" if task.problem_type == "regression" else f"of kind {task.kind}"
            raise ConfigError(
                f'Task "{label}" is {what}; a control task needs one class for each row, or tokens that are predicted.'
            )
        if key == "ood":
            _check_ood(label, task, other)
        if key == "control" and other.streaming:
            raise ConfigError(f'The control task "{other.name}" is streamed, and draws of its rows need all of them.')
        if key == "shifted" and task.labels and other.labels and other.labels != task.labels:
            raise ConfigError(
                f'The shifted task "{other.name}" must have the labels of task "{label}", in their order.'
            )
        if key == "shifted" and not other.has_test:
            raise ConfigError(f'The shifted task "{other.name}" of task "{label}" has no test rows to be scored.')


def _check_ood(label: str, task: Task, other: Task) -> None:
    """Check that scores of a task can tell another one from it."""
    if not task.has_classes or task_kind(task.kind).predicts_tokens:
        raise ConfigError(f'Task "{label}" has no single class for each row, which the scores of "ood" rest on.')
    if other.name == task.name:
        raise ConfigError(f'The ood task of "{label}" is that task itself; name another one.')
    if task.streaming or other.streaming:
        raise ConfigError(f'The ood task "{other.name}" of task "{label}": draws of streamed rows need all of them.')
