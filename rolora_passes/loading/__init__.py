"""What is behind `load_model`: checkpoints and GGUF files of which nothing goes unread."""
