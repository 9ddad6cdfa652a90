"""The commands: one file each, with `add(commands)` for its options and `run(options)`."""
