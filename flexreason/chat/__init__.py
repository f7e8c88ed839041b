"""From messages to samples: what a chat template stands for, found by rendering it.

In reading order: `bounds` (a template is stopped in time), `render` (messages to text, safely), `messages` (what is
in one), `template` (what a template does, asked with `probes`), `ending` (how messages end), `turns` (one answer's
prompt and target), `survey` (how they are found, with `marks`, `before`, `seam` and `texts`), `tokens` (in context),
`history` (whose text each token of a prompt is), `dirt` (answers that are none), `encode` (`fr.encode`).
"""
