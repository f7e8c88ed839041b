"""Lay out one conversation, draw its mask, and hold its single pass against the N samples on a tiny model."""

import argparse
import shutil
from typing import Any

import torch

import flexreason as fr
from flexreason.proof import oracle
from flexreason.proof.testing import relative_l2, true_float64

CONVERSATION = [  # (what the user says, what the model thinks, what it answers)
    ("usr 2+3 ? bot", "so 5 /think", "5 end"),
    ("usr x4 ? bot", "5 x4 20 /think", "20 end"),
    ("usr ok bot", "", "bye end"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="of the tiny model's random weights")


def run(options: argparse.Namespace) -> int:
    words = list(dict.fromkeys(" ".join(part for turn in CONVERSATION for part in turn).split()))

    def encode(text: str) -> list[int]:
        return [words.index(word) for word in text.split()]

    layout = fr.lay_out_turns([(encode(h), encode(t), encode(r)) for h, t, r in CONVERSATION])
    width = shutil.get_terminal_size((100, 24)).columns

    print("A conversation of three turns, with reasoning in the first two, is three training sequences:\n")
    for i, sample in enumerate(fr.unmerge(layout)):
        prompt, target = (" ".join(words[t] for t in ids) for ids in (sample.prompt_ids, sample.target_ids))
        print(f"  turn {i}: {prompt}  ->  {target}")
    print("\nflexreason stores every shared token once. The context copy of a response (ctx) stands on the trunk,")
    print("reasoning and the generated copy (resp) on a branch of their own:\n")
    print(fr.draw_layout(layout, words.__getitem__, width=width))
    print("\nEach token sees its ancestors (visible(q, kv) <=> kv <= q < until[kv]):\n")
    for token, line in zip(layout.input_ids.tolist(), fr.draw_mask(layout).splitlines(), strict=True):
        print(f"{words[token]:>8} {line}")

    model = _tiny_model(len(words), options.seed)
    row = fr.collate([layout], block_size=1)  # no padding: a conversation this small is all there is
    with true_float64():
        samples = oracle.n_samples(model, fr.unmerge(layout))
        fr.patch(model)
        mean = model(**row).loss
        mean.backward()
    n = samples.n_targets
    loss, gradients = float(mean.detach()) * n, {name: p.grad * n for name, p in model.named_parameters()}
    worst = max(relative_l2([gradients[name]], [expected]) for name, expected in samples.gradients.items())
    print("\nA tiny Qwen3 with random weights, in fp64:\n")
    print(f"  {'':<12}{'passes':>7}{'tokens':>8}{'targets':>9}   loss")
    print(f"  {'N samples':<12}{layout.n_samples:>7}{samples.tokens:>8}{n:>9}   {samples.loss_sum / n:.12f}")
    print(f"  {'single pass':<12}{1:>7}{row['input_ids'].shape[1]:>8}{n:>9}   {loss / n:.12f}")
    print(f"\n  largest difference of a parameter's gradient, relative: {worst:.1e}")
    exact = worst <= 1e-9 and abs(loss / samples.loss_sum - 1) <= 1e-9
    print("  the same loss and the same gradients" if exact else "  NOT the same: please report this")
    return 0 if exact else 1


def _tiny_model(vocabulary: int, seed: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    return Qwen3ForCausalLM(config).double()
