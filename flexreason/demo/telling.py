"""What the demo prints: progress, conversations and tables."""

import time
from collections.abc import Callable, Iterable

from flexreason.demo.fit import Step
from flexreason.demo.task import Messages

Say = Callable[[str], None]

EVERY = 5.0
"""Seconds between two lines of progress."""


def watched(training: Iterable[Step], steps: int, say: Say) -> list[Step]:
    """All steps of a training, with a line now and then, and one for the last."""
    done: list[Step] = []
    started = told = time.perf_counter()
    for step in training:
        done.append(step)
        now = time.perf_counter()
        if len(done) == 1 or now - told >= EVERY:
            say(f"  step {len(done):>4} of {steps}   loss {step.loss:7.4f}   {now - started:4.0f} s")
            told = now
    say(f"  done {len(done):>4} of {steps}   loss {done[-1].loss:7.4f}   {time.perf_counter() - started:4.0f} s")
    return done


def transcript(messages: Messages) -> str:
    """A conversation to read, reasoning in brackets."""
    lines = []
    for message in messages:
        thought = f"({message['reasoning_content']})  " if message.get("reasoning_content") else ""
        lines.append(f"  {message['role']:<10} {thought}{message['content']}")
    return "\n".join(lines)
