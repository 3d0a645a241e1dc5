"""Floor 5: the command line, pipelines and launchers."""
