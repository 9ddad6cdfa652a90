"""Graphs in words: what one is made of, layer by layer, and what is different between two."""
