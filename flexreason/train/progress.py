"""What happens along a run: when it saves and evaluates, what it says, and a log of every step."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from flexreason.data.rows import Rows
from flexreason.talk.interrupt import Interrupt
from flexreason.talk.telling import Stage, clock, stage
from flexreason.train.settings import Settings


class Progress(TrainerCallback):
    """Steps are counted over all epochs of a run. The Trainer takes these for one epoch, since `Rows` holds them all.

    Args:
        log: The file of the log, `log.jsonl`.
        rows: What is trained on.
        rows_per_step: Rows of an optimizer step, on all processes.
        settings: When to save and to evaluate.
        say: Is given a line for people at every log.
        first: Whether this is the first process, which alone writes and says.
        stops: Whether Ctrl-C waits for the end of a step, and for a checkpoint. Of several processes whoever has
            started them ends them at once.
    """

    def __init__(
        self,
        log: Path,
        rows: Rows,
        rows_per_step: int,
        settings: Settings,
        say: Callable[[str], None],
        first: bool,
        stops: bool = False,
    ) -> None:
        self.log, self.rows, self.rows_per_step, self.settings, self.first = log, rows, rows_per_step, settings, first
        self.say = say
        self.last_step = len(rows) // rows_per_step
        self.ends_of_epochs = {start // rows_per_step for start in rows.starts[1:]}
        self.going: Stage | None = None
        self.stops = stops
        self.interrupt: Interrupt | None = None
        self.was_stopped = False
        self.stages = ExitStack()
        self.evaluating: Stage | None = None

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

    @contextmanager
    def told(self) -> Iterator[None]:
        """Train in here: it is told how far that is, and a first Ctrl-C ends it with a checkpoint."""
        with stage("training", self.last_step, "steps") as going, self.stages:
            words = "stopping when this step is done and saved; Ctrl-C again stops at once"
            self.going, self.interrupt = going, Interrupt(lambda: going.say(words))
            with self.interrupt.heeded() if self.stops else nullcontext():
                yield

    @property
    def was_asked(self) -> bool:
        """Whether Ctrl-C came while it trained."""
        return self.interrupt is not None and self.interrupt.is_asked

    def _heed(self, step: int, control: Any) -> None:
        """End with a checkpoint if that is asked for; the last step ends by itself."""
        if self.was_asked and step != self.last_step:
            control.should_save = control.should_training_stop = self.was_stopped = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.going is not None:
            self.going.skip(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        state.epoch = self.rows.progress(step * self.rows_per_step)
        if self.going is not None:
            self.going.add()
        if self.first:
            self._log_rows(step)
        control.should_save = self._is_due(step, self.settings.save_every)
        if self.settings.evaluation is not None:
            control.should_evaluate = self._is_due(step, self.settings.evaluate_every)
        self._heed(step, control)

    def _is_due(self, step: int, every: int | None) -> bool:
        """Whether something is done after a step: every so often or, if that is not said, at the end of every epoch;
        and always after the last step."""
        due = step in self.ends_of_epochs if every is None else step % every == 0
        return due or step == self.last_step

    def _log_rows(self, step: int) -> None:
        """Log which conversations the rows of a step hold."""
        rows = range((step - 1) * self.rows_per_step, step * self.rows_per_step)
        documents: Any = self.rows.items
        conversations = [[documents.conversation(n) for n in self.rows.documents(row)] for row in rows]
        self._write({"step": step, "epoch": self.rows.epoch_of(rows[0]), "rows": conversations})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.first or not logs or not {"loss", "eval_loss"} & logs.keys():
            return
        self._write({"step": state.global_step, **logs})
        left = self.going.left() if self.going is not None and "loss" in logs else None
        self.say(
            f"step {state.global_step:>6}/{self.last_step}  epoch {state.epoch or 0:.2f}  {_words(logs)}"
            + (f"  {clock(left)} left" if left else "")
        )

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.evaluating is None:
            n_rows = len(kwargs["eval_dataloader"])
            self.evaluating = self.stages.enter_context(stage("evaluating", n_rows, "rows"))
        self.evaluating.add()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stages.close()
        self.evaluating = None
        self._heed(state.global_step, control)

    def _write(self, entry: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def _words(logs: dict[str, float]) -> str:
    words = []
    for prefix, name in (("", "loss"), ("eval_", "evaluation")):
        if f"{prefix}loss" in logs:
            by_role = [
                f"{role} {logs[key]:.4f}"
                for role in ("reasoning", "response")
                if (key := f"{prefix}loss_{role}") in logs
            ]
            words.append(f"{name} {logs[f'{prefix}loss']:.4f}" + (f" ({', '.join(by_role)})" if by_role else ""))
    if "learning_rate" in logs:
        words.append(f"lr {logs['learning_rate']:.1e}")
    if "tree_tokens_per_second" in logs:
        words.append(_speed(logs))
    return "  ".join(words)


def _speed(logs: dict[str, float]) -> str:
    return f"{logs['tree_tokens_per_second']:,.0f} tokens/s, {logs['sample_tokens_per_second']:,.0f} of samples"
