"""The bundled instruction templates, one YAML file a task."""
