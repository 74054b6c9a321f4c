"""Training: one loop (`loop`), a task for the generator and one for the tokenizer."""
