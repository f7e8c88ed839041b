"""The commands, a module each and all of one form: a docstring, `add_arguments(parser)` and `run(options) -> int`."""
