"""The commands by family; every module has `add_commands(subparsers)` and imports what a command needs inside it."""
