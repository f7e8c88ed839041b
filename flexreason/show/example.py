"""A conversation of three turns, small enough to be read token by token: as samples, as a tree, and as a mask."""

from torch import Tensor

from flexreason.show.picture import Label, Picture, Square, add_legend, colours_of
from flexreason.tree.layout import Layout, lay_out_turns
from flexreason.tree.mask import dense_mask
from flexreason.tree.sample import Role

CONVERSATION = [  # (what the user says, what the model thinks, what it answers)
    ("usr 2+3 ? bot", "so 5 /think", "5 end"),
    ("usr x4 ? bot", "5 x4 20 /think", "20 end"),
    ("usr ok bot", "", "bye end"),
]

WORDS = list(dict.fromkeys(" ".join(part for turn in CONVERSATION for part in turn).split()))
"""The vocabulary: a token's id is its word's place here."""

CELL, LINE, LETTER = 12, 32, 6.8
"""In pixels: from one square of the mask to the next, from one line of words to the next, and a letter's width."""


def example_layout() -> Layout:
    def encode(text: str) -> list[int]:
        return [WORDS.index(word) for word in text.split()]

    return lay_out_turns([(encode(h), encode(t), encode(r)) for h, t, r in CONVERSATION])


def example_picture() -> Picture:
    """The samples above the tree that they become, and beside both who sees whom in it."""
    layout = example_layout()
    texts, colours = [WORDS[token] for token in layout.input_ids.tolist()], colours_of(layout)
    paths = [path_of(layout, turn) for turn in range(layout.n_samples)]
    picture = Picture(0, 0, "Three samples become one tree, and a mask says who sees whom in it")

    words = f"{len(paths)} samples: {sum(map(len, paths))} tokens"
    _add_title(picture, 16, 20, words, "what the model sees at each turn, and is trained to write (orange, dark green)")
    y = 74.0
    for path in paths:
        x = 16.0
        for index in path:
            x = _add_word(picture, x, y, texts[index], colours[index])
        picture.width = max(picture.width, x)
        y += LINE
    _add_title(picture, 16, y + 22, f"1 tree: {len(layout)} tokens, 1 pass", "what samples begin with is stored once")
    _add_tree(picture, layout, texts, colours, 16, y + 76)

    left, top = picture.width + 80, 58
    _add_title(picture, left, 20, "Who sees whom in the tree", "each line: a token, and what it sees")
    picture.add_mask(dense_mask(layout), colours, left, top, CELL)
    for at, word in enumerate(texts):
        picture.labels.append(Label(left - 6, top + at * CELL + 9, word, colours[at], "end", 10))
    picture.width, picture.height = left + len(layout) * CELL + 16, top + len(layout) * CELL + 44
    add_legend(picture, 16, picture.height - 14)
    return picture


def path_of(layout: Layout, turn: int) -> list[int]:
    """The indices of a turn's sample: the last token that is generated in it, and what this token sees.

    >>> path_of(lay_out_turns([([1], [2], [3]), ([4], [5], [6])]), 0)
    [0, 5, 6]
    """
    generated = (layout.turn == turn) & ((layout.role & int(Role.RESPONSE)) != 0)
    last = int(generated.nonzero().max())
    return dense_mask(layout)[last].nonzero().flatten().tolist()


def _add_tree(picture: Picture, layout: Layout, texts: list[str], colours: list[str], x: float, y: float) -> None:
    """The trunk as a line of words; each branch as a line of its own, below the token that it goes on from."""
    ends: list[tuple[float, float]] = []  # of each token's word, and the height of its line
    lowest = y
    for index, parent in enumerate(parents(layout)):
        at, line = (x, y) if parent is None else ends[parent]
        if parent is not None and parent != index - 1:
            lowest += LINE
            picture.squares.append(Square(at - 6, line + 6, 1, lowest - line - 6, "soft"))
            picture.squares.append(Square(at - 6, lowest - 1, 6, 1, "soft"))
            line = lowest
        ends.append((_add_word(picture, at, line, texts[index], colours[index]), line))


def parents(layout: Layout) -> list[int | None]:
    """For each token the one that it goes on from: the last that it sees before itself.

    >>> parents(lay_out_turns([([1], [2], [3]), ([4], [5], [6])]))
    [None, 0, 1, 2, 3, 0, 5]
    """
    mask: Tensor = dense_mask(layout)
    seen = [line.nonzero().flatten().tolist() for line in mask]
    return [before[-2] if len(before) > 1 else None for before in seen]


def _add_title(picture: Picture, x: float, y: float, title: str, words: str) -> None:
    picture.labels += [Label(x, y, title, "ink", size=13, is_strong=True), Label(x, y + 16, words, size=10)]


def _add_word(picture: Picture, x: float, y: float, word: str, colour: str) -> float:
    """A word over a line of its colour; where the next one begins."""
    width = round(LETTER * len(word)) + 6
    picture.labels.append(Label(x + width / 2 - 1, y, word, "ink", "middle", 11.5))
    picture.squares.append(Square(x, y + 4, width - 2, 3, colour))
    return x + width
