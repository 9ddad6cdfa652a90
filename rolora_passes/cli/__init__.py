"""The command line: `rolora COMMAND`; one file a command, with `add(commands)` and `run(options)`."""

from rolora_passes.cli.main import main

__all__ = ["main"]
