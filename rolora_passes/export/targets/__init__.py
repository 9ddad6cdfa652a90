"""The package's own targets, a file each: its name is the target's, and its class is called TARGET there."""
