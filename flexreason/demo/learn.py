"""The demo itself: some steps held against the N samples, training by `flexreason train`, questions, and whether all of
it came to what the demo promises."""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexreason.demo import answers, material
from flexreason.demo.compare import Say
from flexreason.demo.ways import BETA2, CLIP, LEARNING_RATE, N_SAMPLES, SINGLE_PASS, WARM_UP, WEIGHT_DECAY, fit
from flexreason.talk.telling import each, stage
from flexreason.train import run
from flexreason.train.settings import from_mapping, read_yaml
from flexreason.tree.draw import draw_table

BESIDE = 10
"""Steps for which the single pass is held against the N samples."""

WANTED_ANSWERS = 0.9
"""Held-out answers that must be right."""

WANTED_LOSS = 0.25
"""The loss of the last steps, at most, as a share of the loss of the first."""

WANTED_SAME = 1e-3
"""How far the losses of single pass and N samples may be apart, relatively, in float32 and after some steps."""


@dataclass(frozen=True)
class Goal:
    """One thing that the demo promises, and what came of it."""

    name: str
    wanted: str
    found: str
    met: bool


def demo(
    out: Path, steps: int, held_out: int, seed: int, device: str, say: Say, started: float
) -> tuple[dict[str, Any], list[Goal]]:
    """All of it, one after the other, and a table of what came of it. `started`: when, by `time.perf_counter`."""
    data = material.make(steps, held_out, seed)
    material.save(out, data)
    say("Sums, and follow-ups on their answers. Reasoning stands in brackets; in later turns it is gone:\n")
    say(_transcript(data.train[0]))
    same = beside_the_samples(data, out, min(BESIDE, steps), seed, device, say)
    losses, train_s = train(out, steps, seed, device, say)
    right, asked, answer_s = ask(data, out, device, say)
    goals = judge(right, asked, losses, same)
    whole_s = time.perf_counter() - started

    rows = [[goal.name, goal.wanted, goal.found, "met" if goal.met else "NOT MET"] for goal in goals]
    say("\n" + draw_table([["", "goal", "found", ""], *rows]))
    say(f"\n{whole_s:.0f} s in all, {train_s:.0f} of them training and {answer_s:.0f} answering")
    say(f"{out}/ has the conversations (train.jsonl, held_out.jsonl), the settings (train.yaml), what was trained")
    say("(run/model), its answers (answers.jsonl) and these figures (demo.json)")
    figures = {
        "seed": seed,
        "steps": steps,
        "device": device,
        "right": right,
        "asked": asked,
        "losses": losses,
        "beside_the_samples": same,
        "train_s": train_s,
        "answer_s": answer_s,
        "whole_s": whole_s,
        "goals": [asdict(goal) for goal in goals],
        "out": str(out),
    }
    (out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    return figures, goals


def judge(right: int, asked: int, losses: Sequence[float], same: dict[str, Any]) -> list[Goal]:
    """The goals, met or not."""
    share, fall = right / asked, losses[-1] / losses[0]
    return [
        Goal(
            "held-out answers right",
            f"at least {WANTED_ANSWERS:.0%}",
            f"{share:.1%} ({right} of {asked})",
            share >= WANTED_ANSWERS,
        ),
        Goal(
            "loss at the end",
            f"at most {WANTED_LOSS:.0%} of the first",
            f"{fall:.1%} ({losses[-1]:.4f} of {losses[0]:.4f})",
            fall <= WANTED_LOSS,
        ),
        Goal(
            f"loss, relative to the N samples', {len(same['single_pass'])} steps",
            f"apart by at most {WANTED_SAME:.0e}",
            f"{same['apart']:.0e}",
            same["apart"] <= WANTED_SAME,
        ),
    ]


def beside_the_samples(
    data: material.Material, out: Path, steps: int, seed: int, device: str, say: Say
) -> dict[str, Any]:
    """Take the first steps in single passes and on the N samples, from the same weights.

    They take turns, so that whatever else the machine does slows both.
    """
    batches = data.batches(steps, seed)
    single, many = (fit(material.start(out, seed, device), way, batches) for way in (SINGLE_PASS, N_SAMPLES))
    words = "the first steps, in single passes and on the N samples"
    pairs = list(each(zip(single, many, strict=True), words, steps, "steps"))
    single_s, many_s = (sum(step.seconds for step in steps) for steps in zip(*pairs, strict=True))
    say(f"\nThe same loss as on the N samples, {steps} steps from the same weights:\n")
    rows = [[f"step {n}", f"{a.loss:.6f}", f"{b.loss:.6f}"] for n, (a, b) in enumerate(pairs, start=1)]
    say(draw_table([["", SINGLE_PASS.name, N_SAMPLES.name], *rows, ["time", f"{single_s:.2f} s", f"{many_s:.2f} s"]]))
    return {
        "single_pass": [a.loss for a, _ in pairs],
        "n_samples": [b.loss for _, b in pairs],
        "apart": max(abs(a.loss / b.loss - 1) for a, b in pairs),
        "single_pass_s": single_s,
        "n_samples_s": many_s,
    }


def train(out: Path, steps: int, seed: int, device: str, say: Say) -> tuple[list[float], float]:
    """Write a file of settings and run `flexreason train` on it; the losses it logged, and the seconds it took."""
    settings = {
        "model": str(out / "start"),
        "data": str(out / "train.jsonl"),
        "output": str(out / "run"),
        "length": material.ROW,
        "steps": steps,
        "learning_rate": LEARNING_RATE,
        "warmup": WARM_UP,
        "weight_decay": WEIGHT_DECAY,
        "clip": CLIP,
        "seed": seed,
        "log_every": max(1, steps // 20),
        "precision": "fp32",
        "trainer": {"adam_beta2": BETA2, "use_cpu": device == "cpu"},
    }
    (out / "train.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    if (out / "run" / "run.json").exists():  # an earlier demo's run, which training would resume
        shutil.rmtree(out / "run")
    say(f"\nflexreason train {out / 'train.yaml'}\n")
    started = time.perf_counter()
    settings_read = from_mapping(read_yaml(out / "train.yaml"), str(out / "train.yaml"))
    outcome = run.train(settings_read, lambda text: say(indent(text, "  ")))
    return outcome.losses, time.perf_counter() - started


def ask(data: material.Material, out: Path, device: str, say: Say) -> tuple[int, int, float]:
    """Ask the model that lies in `out` what it has not seen; right answers, all answers, and the seconds it took."""
    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(out / "run" / "model")
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(out / "run" / "model")
    with stage("answering"):
        answered = answers.answer(model, tokenizer, data.held_out)
    material.save_conversations(out / "answers.jsonl", answered)
    right, asked = answers.right(answered, data.held_out)
    say(f"\n{asked} questions that begin as none before did, each with the model's own earlier answers, such as:\n")
    say(_transcript(answered[0]))
    return right, asked, time.perf_counter() - started


def _transcript(messages: Sequence[dict[str, Any]]) -> str:
    """A conversation to read, reasoning in brackets."""
    lines = []
    for message in messages:
        thought = f"({message['reasoning_content']})  " if message.get("reasoning_content") else ""
        lines.append(f"  {message['role']:<10} {thought}{message['content']}")
    return "\n".join(lines)
