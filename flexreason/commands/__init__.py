"""The command line, a module a command: `add_arguments` and `run`."""
