"""How attention over a tree is computed: one module a backend, and what they share."""
