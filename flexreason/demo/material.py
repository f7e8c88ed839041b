"""What is trained on: conversations, a tokenizer, a model's config; and which conversations share a step's row.

The tokenizer is made on the spot: a token for each byte, and tokens for who speaks, who has ended and who thinks. Its
template does what those of reasoning models do: earlier answers stand in a prompt without their reasoning.

>>> tokenizer = make_tokenizer()
>>> messages = [
...     {"role": "user", "content": "3+4?"},
...     {"role": "assistant", "reasoning_content": "3+4", "content": "7"},
...     {"role": "user", "content": "times 2?"},
... ]
>>> print(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
<user>3+4?<end><bot>7<end><user>times 2?<end><bot>
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flexreason as fr
from flexreason.demo import task
from flexreason.demo.task import Messages

TRAIN = 2000
"""Conversations to train on, or fewer where there are not steps enough to see them."""

ROW = 512
"""Tokens of a row, which is a step's batch: two or three conversations. Many small steps teach more than few large."""

PER_ROW = 4
"""Conversations that fill a row, and a few more."""

TEMPLATE = """
{%- for message in messages %}
  {%- if message.role == "user" %}
    {{- "<user>" + message.content + "<end>" }}
  {%- elif message.role == "assistant" %}
    {{- "<bot>" }}
    {%- if message.reasoning_content and (loop.last or preserve_thinking) %}
      {{- "<think>" + message.reasoning_content + "</think>" }}
    {%- endif %}
    {{- message.content + "<end>" }}
  {%- else %}
    {{- raise_exception("there are only user and assistant here") }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<bot>" }}{% endif %}"""

END, PAD = "<end>", "<pad>"

SPEAKERS, THINK = ("<user>", "<bot>"), ("<think>", "</think>")


@dataclass(frozen=True)
class Material:
    """Conversations to train on and others to ask, and a tokenizer with its template."""

    tokenizer: Any
    train: list[Messages]
    held_out: list[Messages]

    def batches(
        self, steps: int, seed: int, prepare: Callable[[Messages], Messages] = list, **options: Any
    ) -> list[list[fr.Layout]]:
        """The layouts of each step, by what `fr.encode` is given. Whatever this is, the conversations are the same."""
        conversations = self.train[: PER_ROW * steps]
        trees = [fr.encode(messages, self.tokenizer) for messages in conversations]
        rows = fr.Rows(trees, ROW, steps=steps, seed=seed)
        layouts = [fr.encode(prepare(messages), self.tokenizer, **options) for messages in conversations]
        return [[layouts[number] for number in rows.documents(row)] for row in range(len(rows))]


def make(steps: int, n_held_out: int, seed: int) -> Material:
    return Material(make_tokenizer(), *task.make(min(TRAIN, PER_ROW * steps), n_held_out, seed))


def make_tokenizer() -> Any:
    """A tokenizer of transformers, with its template; `save_pretrained` saves both."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    bytewise = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    for text in (PAD, END, *SPEAKERS, *THINK):  # thinking is text, and seen where special tokens are left out
        bytewise.add_tokens([AddedToken(text, special=text not in THINK, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=END, pad_token=PAD, padding_side="left", chat_template=TEMPLATE
    )


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
    """A Qwen3 with 0.8 million parameters. So narrow a model learns sooner from larger weights than usual."""
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


def start(folder: Path, seed: int, device: str) -> Any:
    """The model of the saved config, with random weights: the same that `flexreason train` begins with."""
    from flexreason.load import load_model

    return load_model(str(folder / "start"), "float32", device, seed, False)[0]
