"""Train a small model from scratch in single passes, and let it answer: arithmetic with follow-ups on earlier answers,
a byte-level tokenizer whose template drops reasoning from history, no download, under three minutes on two cores.

    flexreason demo
    flexreason demo --compare --steps 20 --held-out 5
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from flexreason.talk.telling import aside, each, stage

STEPS, TO_COMPARE = 1400, 1000

MARK = ".flexreason-demo"
"""An empty file in a folder that the demo has made."""

HELD_OUT = 100
"""Conversations that are asked, each of some five questions."""

BESIDE = 10
"""Steps for which the single pass is held against the N samples."""

WANTED_ANSWERS = 0.9
"""Held-out answers that must be right."""

WANTED_LOSS = 0.25
"""The loss of the last steps, at most, as a share of the loss of the first."""

WANTED_SAME = 1e-3
"""How far the losses of single pass and N samples may be apart, relatively, in float32 and after some steps."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", dest="out", type=Path, default=Path("flexreason-demo"), help="folder for all files (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the data, their order and the first weights")
    parser.add_argument("--steps", type=int, help=f"of training ({STEPS}, or {TO_COMPARE} a way to compare)")
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT, metavar="N", help="conversations to ask (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="so small a model needs no other (%(default)s)"
    )
    parser.add_argument("--compare", action="store_true", help="instead, ways to train at equal steps and data")
    parser.add_argument("--json", action="store_true", help="print one JSON object; what goes on is told on stderr")


def run(options: argparse.Namespace) -> int:
    steps = options.steps
    if steps is None:
        steps = TO_COMPARE if options.compare else STEPS
    for name, value in (("steps", steps), ("held-out", options.held_out)):
        if value < 1:
            raise ValueError(f"--{name}: expected at least 1, found {value}")
    claim(options.out)

    def say(text: str) -> None:
        with aside():
            print(text, file=sys.stderr if options.json else sys.stdout, flush=True)

    goals: list[Goal] = []
    with one_thread():
        if options.compare:
            from flexreason.demo.compare import compare

            figures = compare(options.out, steps, options.held_out, options.seed, options.device, say)
        else:
            figures, goals = demo(options.out, steps, options.held_out, options.seed, options.device, say)
    if options.json:
        print(json.dumps(figures))
    return 0 if all(goal.met for goal in goals) else 1


def when_stopped(options: argparse.Namespace) -> str:
    return f"{options.out} is unfinished, and the same command begins anew"


def claim(out: Path) -> None:
    """Make the folder the demo's own: files of an earlier demo are written over, and other files are refused."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--output: expected a folder, found a file: {out}")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"--output: {out} holds files that are not the demo's; give another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise ValueError(f"--output: {out} cannot be written to: {error.strerror}; give another folder") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: so small a model gains little from more, and loses much on a core that is busy."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Goal:
    """One thing that the demo promises, and what came of it."""

    name: str
    wanted: str
    found: str
    met: bool


def demo(out: Path, steps: int, held_out: int, seed: int, device: str, say: Any) -> tuple[dict[str, Any], list[Goal]]:
    """Data, some steps beside the N samples, training, answers, and a table of what came of it."""
    started = time.perf_counter()
    from flexreason.commands.train import check_installed
    from flexreason.demo import material
    from flexreason.tree.draw import draw_table

    check_installed()
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
            f"loss as on the N samples, {len(same['single_pass'])} steps",
            f"to {WANTED_SAME:.0e}",
            f"to {same['apart']:.0e}",
            same["apart"] <= WANTED_SAME,
        ),
    ]


def beside_the_samples(data: Any, out: Path, steps: int, seed: int, device: str, say: Any) -> dict[str, Any]:
    """Take the first steps in single passes and on the N samples, from the same weights.

    They take turns, so that whatever else the machine does slows both.
    """
    from flexreason.demo.material import start
    from flexreason.demo.ways import N_SAMPLES, SINGLE_PASS, fit
    from flexreason.tree.draw import draw_table

    batches = data.batches(steps, seed)
    single, many = (fit(start(out, seed, device), way, batches) for way in (SINGLE_PASS, N_SAMPLES))
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


def train(out: Path, steps: int, seed: int, device: str, say: Any) -> tuple[list[float], float]:
    """Write a file of settings and run `flexreason train` on it; the losses it logged, and the seconds it took."""
    import yaml

    from flexreason.demo.material import ROW
    from flexreason.demo.ways import BETA2, CLIP, LEARNING_RATE, WARM_UP, WEIGHT_DECAY
    from flexreason.train.run import train
    from flexreason.train.settings import from_mapping, read_yaml

    settings = {
        "model": str(out / "start"),
        "data": str(out / "train.jsonl"),
        "output": str(out / "run"),
        "length": ROW,
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
    outcome = train(settings_read, lambda text: say(indent(text, "  ")))
    return outcome.losses, time.perf_counter() - started


def ask(data: Any, out: Path, device: str, say: Any) -> tuple[int, int, float]:
    """Ask the model that lies in `out` what it has not seen; right answers, all answers, and the seconds it took."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from flexreason.demo import answers
    from flexreason.demo.material import save_conversations

    started = time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(out / "run" / "model")
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(out / "run" / "model")
    with stage("answering"):
        answered = answers.answer(model, tokenizer, data.held_out)
    save_conversations(out / "answers.jsonl", answered)
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
