"""Tasks, one YAML file each; `kinds` holds the kinds of task."""
