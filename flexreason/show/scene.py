"""A conversation as it is shown: its samples as paths through the layout, in parts that each are of one kind.

>>> import flexreason as fr
>>> scene = Scene(fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])]))
>>> for part in scene.turns[1].parts:
...     print(part.kind, part.trained, part.shared, scene.text(1, part).split())
prompt False True ['1', '2']
response False False ['20']
prompt False False ['3']
reasoning True False ['12']
response True False ['21']

Shapes: S tokens of the layout, n tokens of one sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from flexreason.show.notes import Remark, Spoken
from flexreason.show.texts import MISSING, Reader
from flexreason.tree.layout import Layout
from flexreason.tree.merge import n_alike
from flexreason.tree.sample import Role

KINDS = ("prompt", "reasoning", "response")


@dataclass(frozen=True)
class Part:
    """A stretch of a sample: tokens `start` to `end` of its path, all of one kind."""

    start: int
    end: int
    kind: str  # one of KINDS
    trained: bool
    shared: bool  # with the sample before


@dataclass(frozen=True)
class Turn:
    """A sample to be shown."""

    number: int
    last: int  # index of its last token
    n_prompt: int
    n_shared: int  # tokens that it begins with like the sample before
    trained: np.ndarray  # [n] bool
    parts: list[Part]

    @property
    def n_trained(self) -> int:
        return int(self.trained.sum())


@dataclass(eq=False)
class Scene:
    """A conversation's layout with its text.

    Args:
        layout: What is shown.
        tokenizer: What reads token ids; without one they are shown as numbers.
        where: Where the conversation stands.
        messages: The message that each turn trains on, where that is known.
        remarks: What is to be said of turns and messages.
        untrained: Answers that no turn is.
        how: How each turn's target was found, where that is known.
    """

    layout: Layout
    tokenizer: Any = None
    where: str = ""
    messages: Sequence[int] = ()
    remarks: Sequence[Remark] = ()
    untrained: Sequence[Spoken] = ()
    how: Sequence[str] = ()
    reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        self.layout = self.layout.to("cpu")
        self.reader = Reader(self.tokenizer)
        self.ids, self.until = self.layout.input_ids.numpy(), self.layout.until.numpy()
        self._kinds = _kinds(self.layout.role.numpy())
        self._kept: tuple[int, np.ndarray] | None = None  # the path that was asked for last

    @cached_property
    def turns(self) -> list[Turn]:
        turns: list[Turn] = []
        before = np.empty(0, dtype=np.int64)
        of_turn, sources = self.layout.target_turn.numpy(), self.layout.target_source.numpy()
        weights, ids = self.layout.target_weight.numpy(), self.layout.target_ids.numpy()
        for number in range(self.layout.n_samples):
            mine = np.flatnonzero(of_turn == number)
            last = self._child(int(sources[mine[-1]]), int(ids[mine[-1]]))
            path = self._path(last)
            trained = np.zeros(len(path), dtype=bool)
            trained[1:] = np.isin(path[:-1], sources[mine[weights[mine] != 0]])
            n_shared = n_alike(path, before)
            n_prompt = int(np.searchsorted(path, sources[mine[0]])) + 1
            parts = self._parts(path, n_prompt, trained, n_shared)
            turns.append(Turn(number, last, n_prompt, n_shared, trained, parts))
            before = path
        return turns

    def path(self, number: int) -> np.ndarray:
        """[n] The indices of a sample's tokens."""
        if self._kept is None or self._kept[0] != number:
            self._kept = (number, self._path(self.turns[number].last))
        return self._kept[1]

    def _path(self, last: int) -> np.ndarray:
        return np.flatnonzero(self.until[: last + 1] > last)

    def _child(self, source: int, token: int) -> int:
        """The index of the token that the last target is: a child of the token that predicts it."""
        at = source + 1
        while at < self.until[source]:
            if self.ids[at] == token:
                return at
            at = int(self.until[at])
        return source  # it is not stored, since nothing reads it

    def _parts(self, path: np.ndarray, n_prompt: int, trained: np.ndarray, n_shared: int) -> list[Part]:
        index = np.arange(len(path))
        kinds = np.where(index < n_prompt, self._kinds[0][path], self._kinds[1][path])
        shared = index < n_shared
        changes = (np.diff(kinds) != 0) | (np.diff(trained) != 0) | (np.diff(shared) != 0)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(path)]
        return [
            Part(start, end, KINDS[kinds[start]], bool(trained[start]), bool(shared[start]))
            for start, end in pairwise(edges)
        ]

    # --- text

    def text(self, number: int, part: Part) -> str:
        """The text of a part of a sample."""
        return "".join(self.pieces(number, part))

    def pieces(self, number: int, part: Part) -> list[str]:
        """The text of each of its tokens."""
        indices = self.path(number)[part.start : part.end].tolist()
        reread = self.reread(number)
        return [reread.get(index, self.texts[index]) for index in indices]

    @property
    def texts(self) -> list[str]:
        """[S] The text of each token, as the first sample through it reads it."""
        return self._read[0]

    def reread(self, number: int) -> dict[int, str]:
        """Tokens that another sample reads otherwise: two samples may part within a character."""
        last = self.turns[number].last
        of_sample: dict[int, str] = {}
        for index, texts in self.rereads:
            if index <= last < self.until[index]:
                of_sample.update(texts)
        return of_sample

    @property
    def rereads(self) -> list[tuple[int, dict[int, str]]]:
        """For every sample through a token, texts of other tokens."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[list[str], list[tuple[int, dict[int, str]]]]:
        texts, was_read = [""] * len(self.ids), np.zeros(len(self.ids), dtype=bool)
        goes_on = np.zeros(len(self.ids), dtype=bool)  # a character that is not whole with this token
        rereads: list[tuple[int, dict[int, str]]] = []
        for turn in self.turns:
            path = self._path(turn.last)
            n_read = int(was_read[path].sum())
            if n_read == len(path):
                continue
            begin = n_read
            while begin and goes_on[path[begin - 1]]:
                begin -= 1
            pieces = self.reader.pieces(self.ids[path[begin:]].tolist())
            if begin < n_read:
                again = dict(zip(path[begin:n_read].tolist(), pieces[: n_read - begin], strict=True))
                rereads.append((int(path[n_read]), again))
            new = path[n_read:].tolist()
            for index, piece, following in zip(
                new, pieces[n_read - begin :], [*pieces[n_read - begin + 1 :], None], strict=True
            ):
                texts[index] = piece
                goes_on[index] = following == "" or MISSING in piece
            was_read[path] = True
        return texts, rereads

    def is_added(self, index: int) -> bool:
        """Whether a token is a special one, or a marker."""
        return int(self.ids[index]) in self.reader.added

    # --- in words

    @property
    def sizes(self) -> str:
        """How many turns, tokens and targets there are, in words."""
        n, layout = len(self.turns), self.layout
        turns = "1 turn" if n == 1 else f"{n:,} turns"
        reasoning = sum(p.end - p.start for t in self.turns for p in t.parts if p.trained and p.kind == "reasoning")
        trained = sum(turn.n_trained for turn in self.turns)
        return (
            f"{turns} · {layout.sample_tokens:,} tokens in samples, {len(layout):,} stored once "
            f"({layout.sample_tokens / len(layout):.2f} to 1) · {trained:,} trained, {reasoning:,} of them reasoning"
        )

    def remarks_of(self, number: int) -> list[Remark]:
        return [remark for remark in self.remarks if remark.turn == number]


def _kinds(roles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[S] The kind of each token where it is read, and where it is generated."""
    is_reasoning = (roles & Role.REASONING) != 0
    read = np.where(is_reasoning & ((roles & Role.PROMPT) == 0), 1, 0)
    read = np.where((roles & Role.CONTEXT) != 0, 2, read)
    return read, np.where(is_reasoning, 1, 2)
