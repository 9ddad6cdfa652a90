"""XNNPACK's delegates: which nodes one holds, and how it is written."""
