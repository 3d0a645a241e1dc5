"""Floor 6: the command line, pipelines and launchers."""
