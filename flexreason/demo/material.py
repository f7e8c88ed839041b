"""What is trained on: conversations, a tokenizer, a model's config; and which conversations share a step's row."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flexreason as fr
from flexreason.demo import task, tokenizer
from flexreason.demo.task import Messages
from flexreason.demo.ways import Way

TRAIN = 2000
"""Conversations to train on, or fewer where there are not steps enough to see them."""

ROW = 512
"""Tokens of a row, which is a step's batch: two or three conversations. Many small steps teach more than few large."""

PER_ROW = 4
"""Conversations that fill a row, and a few more."""


@dataclass(frozen=True)
class Material:
    """Conversations to train on and others to ask, and a tokenizer with its template."""

    tokenizer: Any
    train: list[Messages]
    held_out: list[Messages]

    def batches(self, way: Way, steps: int, seed: int) -> list[list[fr.Layout]]:
        """The conversations of each step, as a way lays them out. They are the same for every way."""
        some = self.train[: PER_ROW * steps]
        trees = [fr.encode(messages, self.tokenizer) for messages in some]
        rows = fr.Rows(trees, ROW, steps=steps, seed=seed)
        layouts = [fr.encode(messages, self.tokenizer, **way.options) for messages in some] if way.options else trees
        return [[layouts[number] for number in rows.documents(row)] for row in range(len(rows))]


def make(steps: int, n_held_out: int, seed: int) -> Material:
    return Material(tokenizer.make(), *task.make(min(TRAIN, PER_ROW * steps), n_held_out, seed))


def save(folder: Path, material: Material) -> None:
    """The conversations as JSONL, and beside them a folder with the tokenizer and a model's config, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    save_conversations(folder / "train.jsonl", material.train)
    save_conversations(folder / "held_out.jsonl", material.held_out)
    material.tokenizer.save_pretrained(folder / "start")
    config(material.tokenizer).save_pretrained(folder / "start")


def save_conversations(path: Path, conversations: Iterable[Messages]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))


def config(tokenizer: Any) -> Any:
    """Of a Qwen3 with 0.8 million parameters. So narrow a model learns sooner from weights larger than the usual."""
    from transformers import Qwen3Config

    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
