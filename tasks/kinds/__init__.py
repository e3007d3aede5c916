"""Kinds of task, one Python file each."""
