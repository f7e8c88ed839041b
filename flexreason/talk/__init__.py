"""How commands talk with people: what was meant, what is being done, and how it ends."""
