"""`flexreason demo --compare`: four ways to train, at equal steps on equal conversations, from the same weights.

Each is asked the same: to answer as at inference, where reasoning is gone from the history. And the loss of each is
that on the true samples of the held-out conversations.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

import flexreason as fr
from flexreason.demo import answers, material
from flexreason.demo.fit import fit, start
from flexreason.demo.telling import Say, watched
from flexreason.demo.ways import LAST_TURN, LEAKING, N_SAMPLES, SINGLE_PASS, Way
from flexreason.tree.draw import draw_table

FIRST = 10
"""Steps over which two ways that are the same stay together; later, training makes rounding larger."""

WAYS = (SINGLE_PASS, N_SAMPLES, LAST_TURN, LEAKING)


def compare(out: Path, steps: int, held_out: int, seed: int, device: str, say: Say) -> dict[str, Any]:
    """All ways one after the other, and a table of what they gave."""
    started = time.perf_counter()
    data = material.make(steps, held_out, seed)
    material.save(out, data)
    say(f"Four ways to train, {steps} steps each on the same conversations, from the same weights")
    found = {way.name: _one(way, data, out, steps, seed, device, say) for way in WAYS}
    rows = [
        [
            name,
            f"{one['right'] / one['asked']:.1%}",
            f"{one['held_out_loss']:.4f}",
            f"{one['train_s']:.0f} s",
            f"{one['targets'] / steps:.0f}",
        ]
        for name, one in found.items()
    ]
    say("\n" + draw_table([["", "held-out answers right", "held-out loss", "training", "targets a step"], *rows]))
    apart = [
        abs(a / b - 1) for a, b in zip(found[SINGLE_PASS.name]["losses"], found[N_SAMPLES.name]["losses"], strict=True)
    ]
    say(
        f"\nSingle pass and N samples, step by step: losses apart by at most {max(apart[:FIRST]):.0e} over the first "
        f"{min(FIRST, steps)} steps, {max(apart):.0e} over all"
    )
    whole_s = time.perf_counter() - started
    say(f"\n{whole_s:.0f} s in all; {out / 'compare.json'} has these figures")
    made = {"seed": seed, "steps": steps, "device": device, "ways": found, "apart": apart, "whole_s": whole_s}
    (out / "compare.json").write_text(json.dumps(made, indent=1) + "\n")
    return made


def _one(way: Way, data: material.Material, out: Path, steps: int, seed: int, device: str, say: Say) -> dict[str, Any]:
    """A model trained in one way, and what it can do."""
    say(f"\n{way.name}: {way.words}\n")
    batches, model = data.batches(way, steps, seed), start(out, seed, device)
    done = watched(fit(model, way, batches), steps, say)
    right, asked = answers.right(answers.answer(model, data.tokenizer, data.held_out), data.held_out)
    say(f"  {right} of {asked} held-out answers right")
    return {
        "right": right,
        "asked": asked,
        "held_out_loss": held_out_loss(model, data),
        "train_s": sum(step.seconds for step in done),
        "targets": sum(len(layout.target_ids) for layouts in batches for layout in layouts),
        "losses": [step.loss for step in done],
    }


def held_out_loss(model: Any, data: material.Material) -> float:
    """The mean over all targets of the held-out conversations' samples, with the history that inference sees."""
    layouts = [fr.encode(messages, data.tokenizer) for messages in data.held_out]
    row = {key: value.to(model.device) for key, value in fr.collate(layouts).items()}
    fr.patch(model).eval()
    with torch.no_grad():
        loss = float(model(**row).loss)
    fr.unpatch(model)
    return loss
