"""LoRA branches of a graph, and adapters as PEFT keeps them."""
