"""`python -m ldm_lab COMMAND`: one module per command.

A command module's docstring is its help; `add_arguments(parser)` declares its arguments, `run(args) -> int | None`
does the work. Its name is the command's, with dashes for underscores.
"""
