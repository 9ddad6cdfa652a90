"""Training inside passes: the loop, losses, and one process or many."""
