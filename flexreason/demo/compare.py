"""`flexreason demo --compare`: ways to train, at equal steps on equal conversations, from the same weights.

Each model is then asked the same: to answer as at inference, where reasoning is gone from the history. And the loss of
each is taken on the true samples of the held-out conversations.
"""

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import flexreason as fr
from flexreason.demo import answers, material
from flexreason.demo.ways import AS_SHOWN, LAST_TURN, LEAKING, N_SAMPLES, SINGLE_PASS, Step, Way, fit, row_loss
from flexreason.tree.draw import draw_table

Say = Callable[[str], None]

FIRST = 10
"""Steps over which two ways that are the same stay together; later, training makes rounding larger."""

EVERY = 5.0
"""Seconds between two lines of progress."""

WAYS = (SINGLE_PASS, N_SAMPLES, LAST_TURN, AS_SHOWN, LEAKING)


def compare(out: Path, steps: int, held_out: int, seed: int, device: str, say: Say) -> dict[str, Any]:
    """Train in all ways, one after the other, and draw a table of what they gave."""
    started = time.perf_counter()
    data = material.make(steps, held_out, seed)
    material.save(out, data)
    say(f"{len(WAYS)} ways to train, {steps} steps each on the same conversations, from the same weights")
    results = {way.name: _result(way, data, out, steps, seed, device, say) for way in WAYS}
    lines = [
        [
            name,
            f"{result['right'] / result['asked']:.1%}",
            f"{result['held_out_loss']:.4f}",
            f"{result['train_s']:.0f} s",
            f"{result['targets'] / steps:.0f}",
        ]
        for name, result in results.items()
    ]
    say("\n" + draw_table([["", "held-out answers right", "held-out loss", "training", "targets a step"], *lines]))
    pairs = zip(results[SINGLE_PASS.name]["losses"], results[N_SAMPLES.name]["losses"], strict=True)
    apart = [abs(single / samples - 1) for single, samples in pairs]
    say(
        f"\nSingle pass and N samples, step by step: losses apart by at most {max(apart[:FIRST]):.0e} over the first "
        f"{min(FIRST, steps)} steps{'; later, rounding makes two runs of them' if steps > FIRST else ''}"
    )
    whole_s = time.perf_counter() - started
    say(f"\n{whole_s:.0f} s in all; {out / 'compare.json'} has these figures")
    figures = {"seed": seed, "steps": steps, "device": device, "ways": results, "apart": apart, "whole_s": whole_s}
    (out / "compare.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def _result(
    way: Way, data: material.Material, out: Path, steps: int, seed: int, device: str, say: Say
) -> dict[str, Any]:
    """Train a model in one way; what it can do, and what it took."""
    say(f"\n{way.name}: {way.words}\n")
    batches, model = data.batches(steps, seed, way.prepare, **way.options), material.start(out, seed, device)
    done = _watched(fit(model, way, batches), steps, say)
    right, asked = answers.right(answers.answer(model, data.tokenizer, data.held_out), data.held_out)
    say(f"  {right} of {asked} held-out answers right")
    return {
        "right": right,
        "asked": asked,
        "held_out_loss": _held_out_loss(model, data),
        "train_s": sum(step.seconds for step in done),
        "targets": sum(len(layout.target_ids) for layouts in batches for layout in layouts),
        "losses": [step.loss for step in done],
    }


def _watched(training: Iterable[Step], steps: int, say: Say) -> list[Step]:
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


def _held_out_loss(model: Any, data: material.Material) -> float:
    """The mean over all targets of the held-out conversations' samples, with the history that inference sees."""
    layouts = [fr.encode(messages, data.tokenizer) for messages in data.held_out]
    with torch.no_grad():
        loss = float(row_loss(fr.patch(model).eval(), layouts))
    fr.unpatch(model)
    return loss
