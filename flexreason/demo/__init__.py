"""The demo: a small task, a tokenizer, a model trained from scratch in single passes, and what it answers."""
