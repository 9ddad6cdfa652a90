"""Graphs in words: the structure of one, layer by layer, and the differences between two."""
