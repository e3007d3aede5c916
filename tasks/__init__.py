"""Tasks, one YAML file each, and in `kinds` the kinds of task, one Python file each."""
