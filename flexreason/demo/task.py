"""A task that a small model learns in a minute, and only from the right history: sums, and follow-ups on their answers.

    17+5?      think 17+5: 7+5=12, 1+1=2      answer 22
    times 3?   think 22x3: 2x3=6, 2x3+0=6     answer 66
    minus 8?   think 66-8: 16-8=8, 6-1=5      answer 58

A follow-up can only be answered with the answer before it, and the reasoning that led to that is not there any more:
the template drops it. All answers are from 0 to 99.

Held-out conversations begin with sums that no training conversation begins with, so that every one of their prompts is
new; what they share are the single steps.

>>> train, held_out = make(1, 1, seed=0)
>>> [message["content"] for message in train[0]][:4]
['8+5?', '13', 'plus 6?', '19']
"""

import random
from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]

TURNS = (4, 6)
"""Fewest and most turns of a conversation."""

LARGEST = 99

HELD_OUT_SUMS = 10
"""One in so many first sums is held out."""


def make(n_train: int, n_held_out: int, seed: int) -> tuple[list[Messages], list[Messages]]:
    """Conversations to train on, and conversations that begin with none of their first sums."""
    draw = random.Random(seed)
    sums = [(a, b) for a in range(1, LARGEST // 2) for b in range(1, 10)]
    draw.shuffle(sums)
    cut = len(sums) // HELD_OUT_SUMS
    return _some(n_train, sums[cut:], draw), _some(n_held_out, sums[:cut], draw)


def _some(n: int, sums: list[tuple[int, int]], draw: random.Random) -> list[Messages]:
    """n conversations; first sums are used up one after the other, and then again."""
    return [_conversation(*sums[number % len(sums)], draw) for number in range(n)]


def _conversation(a: int, b: int, draw: random.Random) -> Messages:
    answers = [a + b]
    messages = _turn(f"{a}+{b}?", plus(a, b), a + b)
    for _ in range(1, draw.randint(*TURNS)):
        of = answers[-1]
        operation = draw.choice([o for o in OPERATIONS if o.possible(of)])
        b = draw.choice(operation.possible(of))
        answers.append(operation.result(of, b))
        messages += _turn(f"{operation.name} {b}?", operation.reasoning(of, b), answers[-1])
    return messages


def _turn(question: str, reasoning: str, answer: int) -> Messages:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": reasoning, "content": str(answer)},
    ]


def plus(a: int, b: int) -> str:
    """The sum of a number and a digit worked out: ones, then tens with the carry.

    >>> plus(17, 5)
    '17+5: 7+5=12, 1+1=2'
    """
    ones = a % 10 + b
    return f"{a}+{b}: {a % 10}+{b}={ones}, {a // 10}+{ones // 10}={a // 10 + ones // 10}"


def minus(a: int, b: int) -> str:
    """The difference worked out: ones, with ten more where they do not suffice, then tens less the one borrowed.

    >>> minus(22, 4)
    '22-4: 12-4=8, 2-1=1'
    """
    borrowed = int(a % 10 < b)
    ones = a % 10 + 10 * borrowed
    return f"{a}-{b}: {ones}-{b}={ones - b}, {a // 10}-{borrowed}={a // 10 - borrowed}"


def times(a: int, b: int) -> str:
    """The product worked out: ones, then tens with what is carried.

    >>> times(22, 3)
    '22x3: 2x3=6, 2x3+0=6'
    """
    ones = a % 10 * b
    return f"{a}x{b}: {a % 10}x{b}={ones}, {a // 10}x{b}+{ones // 10}={a // 10 * b + ones // 10}"


class _Operation:
    def __init__(self, name: str, result: Callable[[int, int], int], reasoning: Callable[[int, int], str]) -> None:
        self.name, self.result, self.reasoning = name, result, reasoning

    def possible(self, a: int) -> list[int]:
        """Digits with which the answer stays from 0 to 99."""
        digits = (2, 3) if self.name == "times" else range(1, 10)
        return [b for b in digits if 0 <= self.result(a, b) <= LARGEST]


OPERATIONS = (
    _Operation("plus", lambda a, b: a + b, plus),
    _Operation("minus", lambda a, b: a - b, minus),
    _Operation("times", lambda a, b: a * b, times),
)
