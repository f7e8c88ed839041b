"""What happens along a run: when to save and to evaluate, what is said, and a log of every step."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

from flexreason.data.rows import Rows
from flexreason.train.settings import Settings


class Along(TrainerCallback):
    """Steps are counted in all of a run's epochs, which the Trainer takes for one."""

    def __init__(
        self,
        log: Path,
        rows: Rows,
        rows_per_step: int,
        settings: Settings,
        say: Callable[[str], None],
        first: bool,
    ) -> None:
        self.log, self.rows, self.rows_per_step, self.settings, self.first = log, rows, rows_per_step, settings, first
        self.say = say
        self.last = len(rows) // rows_per_step
        self.ends = {start // rows_per_step for start in rows.starts[1:]}
        self.bar: Any = None

    def forget_after(self, step: int) -> None:
        """Drop from the log what was done after the checkpoint that a run goes on from."""
        if not self.log.exists():
            return
        unfinished = self.log.with_name(self.log.name + ".unfinished")
        with self.log.open() as old, unfinished.open("w") as kept:
            for line in old:
                try:
                    if json.loads(line)["step"] <= step:
                        kept.write(line)
                except ValueError:  # the run was killed while it wrote this line
                    continue
        unfinished.replace(self.log)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.first:
            self.bar = tqdm(total=self.last, initial=state.global_step, unit=" steps", disable=None, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        state.epoch = self.rows.progress(step * self.rows_per_step)
        if self.first:
            self.bar.update(1)
            rows = range((step - 1) * self.rows_per_step, step * self.rows_per_step)
            documents: Any = self.rows.items
            self._note(
                {
                    "step": step,
                    "epoch": self.rows.epoch_of(rows[0]),
                    "rows": [[documents.conversation(n) for n in self.rows.documents(row)] for row in rows],
                }
            )
        at_end = step in self.ends or step == self.last
        every = self.settings.save_every
        control.should_save = at_end if every is None else step % every == 0 or step == self.last
        every = self.settings.evaluate_every
        if self.settings.evaluation is not None:
            control.should_evaluate = at_end if every is None else step % every == 0 or step == self.last

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.first or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        self._note({"step": state.global_step, **logs})
        words = _words(logs)
        if self.bar is not None and "tree_tokens_per_second" in logs:
            tree, samples = logs["tree_tokens_per_second"], logs["sample_tokens_per_second"]
            self.bar.set_postfix_str(f"{tree:,.0f} tokens/s, {samples:,.0f} of samples", refresh=False)
        if self.bar is not None and not self.bar.disable:
            self.bar.clear()
        self.say(f"step {state.global_step:>6}/{self.last}  epoch {state.epoch or 0:.2f}  {words}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def _note(self, entry: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _words(logs: dict[str, float]) -> str:
    said = []
    for prefix, name in (("", "loss"), ("eval_", "evaluation")):
        if f"{prefix}loss" in logs:
            parts = [
                f"{role} {logs[key]:.4f}"
                for role in ("reasoning", "response")
                if (key := f"{prefix}loss_{role}") in logs
            ]
            said.append(f"{name} {logs[f'{prefix}loss']:.4f}" + (f" ({', '.join(parts)})" if parts else ""))
    if "learning_rate" in logs:
        said.append(f"lr {logs['learning_rate']:.1e}")
    if "tree_tokens_per_second" in logs:
        tree, samples = logs["tree_tokens_per_second"], logs["sample_tokens_per_second"]
        said.append(f"{tree:,.0f} tokens/s, {samples:,.0f} of samples")
    return "  ".join(said)
