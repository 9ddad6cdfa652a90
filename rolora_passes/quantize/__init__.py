"""What quantizers share on a graph: how they are written, what they observe, and runs in stages."""
