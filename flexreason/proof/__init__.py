"""Exactness shown: the N samples as the oracle, tiny models of any structure, and your own model held to it."""
