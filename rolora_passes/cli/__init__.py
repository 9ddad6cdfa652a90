"""The command line: `rolora COMMAND`.

A command is a module of this package, and nothing else has to know of it: `ORDER` is its place in the list,
`SUMMARY` its line there, `EXAMPLES` are commands that its help shows, `add(parser)` declares its options and
`run(options)` does it. A module without ORDER is shared by commands.
"""

from rolora_passes.cli.main import main

__all__ = ["main"]
