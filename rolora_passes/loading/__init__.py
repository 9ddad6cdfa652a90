"""Models, tokenizers and texts from where users keep them; of a checkpoint nothing goes unread."""
