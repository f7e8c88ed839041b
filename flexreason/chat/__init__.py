"""From messages to samples: what a chat template stands for, found by rendering it.

render (a template, safely) -> messages (what is in them) -> templates (what one does) -> turns (one answer's prompt and
target) -> tokens (in context) -> encoding (`fr.encode`); conversations (file formats), template (the command).
"""
