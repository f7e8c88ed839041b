"""Conversations as one page that needs nothing else: style, script and data stand in it, and it may load nothing.

>>> import flexreason as fr
>>> html = page([Scene(fr.lay_out_turns([([1, 2], [10, 11], [20]), ([3], [12], [21])]), where="an example")])
>>> "an example" in html, "http://" in html
(True, False)
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch

from flexreason.show.notes import RefusedScene, Remark, Spoken
from flexreason.show.scene import Scene, Turn
from flexreason.show.texts import printable
from flexreason.tree.blocks import BLOCK, block_mask
from flexreason.tree.layout import Layout, stretches

HERE = Path(__file__).parent


def page(scenes: Sequence[Scene | RefusedScene]) -> str:
    """The page, as HTML."""
    conversations = [_refused(scene) if isinstance(scene, RefusedScene) else _conversation(scene) for scene in scenes]
    script = "".join((HERE / name).read_text() for name in ("tokens.js", "views.js", "mask.js", "frame.js"))
    return fill("What is trained on", (HERE / "show.html").read_text(), {"conversations": conversations}, script)


def fill(title: str, body: str, data: Any, script: str, more_style: str = "") -> str:
    """A page with a style, data and script of its own. Data cannot end the element that they stand in."""
    in_script = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        "title": html.escape(title),
        "style": (HERE / "page.css").read_text() + more_style,
        "body": body,
        "data": in_script.encode("utf-8", "replace").decode(),  # a lone surrogate cannot be written
        "script": script,
    }
    return Template((HERE / "page.html").read_text()).substitute(parts)


def _conversation(scene: Scene) -> dict[str, Any]:
    layout = scene.layout
    return {
        "where": printable(scene.where),
        "sizes": scene.sizes,
        "remarks": [_remark(remark) for remark in scene.remarks],
        "texts": [printable(text) for text in scene.texts],
        "ids": layout.input_ids.tolist(),
        "added": [index for index in range(len(layout)) if scene.is_added(index)],
        "stretches": _stretches(layout),
        "turns": [_turn(scene, turn) for turn in scene.turns],
        "rereads": [[index, {at: printable(text) for at, text in texts.items()}] for index, texts in scene.rereads],
        "untrained": [_spoken(message) for message in scene.untrained],
        "blocks": {"side": BLOCK, "rows": _block_rows(layout)},
    }


def _turn(scene: Scene, turn: Turn) -> dict[str, Any]:
    edges = np.flatnonzero(np.diff(turn.trained.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
    return {
        "message": scene.messages[turn.number] if len(scene.messages) else -1,
        "last": turn.last,
        "prompt": turn.n_prompt,
        "shared": turn.n_shared,
        "trained": edges.tolist(),
    }


def _stretches(layout: Layout) -> list[list[int]]:
    """Tokens one behind the other on a path, of one turn and role and with one `until`."""
    columns = (layout.position_ids, layout.until, layout.turn, layout.role)
    return [[start, end, *(int(column[start]) for column in columns)] for start, end in stretches(*columns)]


def _block_rows(layout: Layout) -> list[list[list[int]]]:
    """For each block of queries, runs [first, last, whole or in part] of key blocks, from the block lists."""
    lists = block_mask(layout)
    kinds = ((0, lists.kv_num_blocks, lists.kv_indices), (1, lists.full_kv_num_blocks, lists.full_kv_indices))
    rows: list[list[list[int]]] = []
    for q in range(lists.kv_num_blocks.shape[-1]):
        runs: list[list[int]] = []
        for kind, counts, indices in kinds:
            if counts is None or indices is None:
                continue
            columns = indices[0, 0, q, : int(counts[0, 0, q])]
            if not len(columns):
                continue
            cuts = (columns.diff() != 1).nonzero()[:, 0] + 1
            runs += [[int(run[0]), int(run[-1]), kind] for run in torch.tensor_split(columns, cuts)]
        rows.append(runs)
    return rows


def _remark(remark: Remark) -> dict[str, Any]:
    return {"turn": remark.turn, "message": remark.message, "where": remark.where, "words": printable(remark.words)}


def _spoken(message: Spoken) -> dict[str, Any]:
    return {"message": message.number, "role": message.role, "text": printable(message.text), "words": message.words}


def _refused(scene: RefusedScene) -> dict[str, Any]:
    names = ("texts", "ids", "added", "stretches", "turns", "rereads", "untrained")
    nothing: dict[str, Any] = {name: [] for name in names}
    refused = {
        "reason": scene.reason,
        "words": printable(scene.words),
        "message": scene.message,
        "where": Remark("", message=scene.message).where,
        "messages": [_spoken(message) for message in scene.messages],
    }
    return {
        **nothing,
        "where": printable(scene.where),
        "sizes": "This conversation is refused.",
        "remarks": [],
        "refused": refused,
        "blocks": {"side": BLOCK, "rows": []},
    }


def write(path: Path, text: str) -> None:
    """Write a page. A folder that is not there is told before."""
    if not path.parent.is_dir():
        raise ValueError(f"--html: there is no folder {path.parent}; make it first")
    path.write_text(text, encoding="utf-8")
