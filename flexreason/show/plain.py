"""A conversation as plain data: what programs read of its samples.

>>> import flexreason as fr
>>> made = plain(Scene(fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])])))
>>> [(one["tokens"], one["shared_tokens"], one["trained_tokens"], one["target"]) for one in made["samples"]]
[(5, 0, 3, '10 11 20 '), (6, 2, 2, '12 21 ')]
>>> made["samples"][1]["shared"], made["samples"][1]["prompt"]
('1 2 ', '20 3 ')
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flexreason.show.notes import RefusedScene
from flexreason.show.scene import Scene


def plain(scene: Scene | RefusedScene, turns: Sequence[int] | None = None) -> dict[str, Any]:
    """The samples as texts and numbers of tokens, or why there are none.

    A sample's text is `shared` (with the sample before), `prompt` (what more it is sent) and `target`.

    Args:
        scene: The conversation.
        turns: Those that are asked for; all if not given.
    """
    if isinstance(scene, RefusedScene):
        return {"where": scene.where, "refused": scene.words, "reason": scene.reason, "message": scene.message}
    chosen = range(len(scene.turns)) if turns is None else turns
    return {
        "where": scene.where,
        "samples": [_sample(scene, number) for number in chosen],
        "tokens_in_samples": scene.layout.sample_tokens,
        "tokens_in_tree": len(scene.layout),
        "trained_tokens": sum(turn.n_trained for turn in scene.turns),
        "remarks": [asdict(remark) for remark in scene.remarks],
        "untrained": [asdict(spoken) for spoken in scene.untrained],
    }


def _sample(scene: Scene, number: int) -> dict[str, Any]:
    turn = scene.turns[number]
    pieces = [piece for part in turn.parts for piece in scene.pieces(number, part)]
    n_shared = min(turn.n_shared, turn.n_prompt)
    return {
        "turn": number,
        "message": scene.messages[number] if scene.messages else None,
        "how": scene.how[number] if scene.how else None,
        "tokens": len(pieces),
        "shared_tokens": n_shared,
        "prompt_tokens": turn.n_prompt,
        "trained_tokens": turn.n_trained,
        "shared": "".join(pieces[:n_shared]),
        "prompt": "".join(pieces[n_shared : turn.n_prompt]),
        "target": "".join(pieces[turn.n_prompt :]),
    }
