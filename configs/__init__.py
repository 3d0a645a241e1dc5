"""Values only: one YAML per stage and size, and the pipelines."""
