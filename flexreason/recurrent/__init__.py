"""How layers that carry state from token to token go through a tree: one module a kind, and what they share."""
