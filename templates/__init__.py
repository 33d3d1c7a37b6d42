"""Instruction templates: one YAML file a task, read by `ie.data.templates`. This package holds data only."""
