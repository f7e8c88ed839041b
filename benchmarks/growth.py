"""The paper's section 4, measured: N passes against one as conversations grow, and which passes compute the same.

    python benchmarks/growth.py                             # N = 1 to 64, turns of 16/32/16 tokens
    python benchmarks/growth.py --turns 1 2 4 8             # shorter
    python benchmarks/growth.py --lengths 16/32/16 64/128/64 --steps-to 16

*Growth*: tokens, visible pairs, time and memory of N passes and of one. Equation 7 says N^3 for the attention of the N
passes, equation 9 says N^2 for that of one: exponents are slopes over N >= 16, of the counted pairs and of attention's
time, one layer forward and backward. Whole steps of a small model stand beside them. Equations 10 and 11 say N^2 of
memory for both: that is so only where S x S is stored (*dense*). *Lengths* holds the number of tokens that are stored
against the sum of |h| + |t| + 2 |r| over all turns, less the last |r|, and less |r_i| of every earlier turn without
reasoning; equation 8 as printed has 2 |t| and |r|: it doubles the wrong term.

*Passes*: figures 1 and 3 and equation 4 as runs of a model in fp64. N passes are what is right; the table says how far
loss and gradients of each pass are off, and whether changing a token of the first turn's reasoning moves the
log-probabilities of the second turn's answer. The right mask under sequential positions (0, 1, 2, ... as stored) is
one of them.
"""

import copy
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import flexreason as fr
from flexreason.attention import segments
from flexreason.bench import steps as ways
from flexreason.bench.measure import interleaved, measure, peak
from flexreason.bench.report import amount, amount_of_samples
from flexreason.bench.steps import Case
from flexreason.proof.float64 import relative_l2, true_float64
from shared import Run, Shape, conversation, logarithmic, shape
from steps import model

HEADS, SIZE = 4, 64

FROM = 16
"""Turns from which on exponents are taken: before, they are those of constants."""

DENSE_FITS = 2**30
"""Bytes of scores of one layer up to which dense attention is run."""


# ---- growth


def attention(layout: fr.Layout) -> dict[str, Callable[[], Any]]:
    """One layer, forward and backward: one pass in segments and dense, and the N samples one by one."""
    draw = torch.Generator().manual_seed(0)
    row = fr.collate([layout])
    length = row["until"].shape[1]
    q, k, v, upstream = (torch.randn(1, HEADS, length, SIZE, generator=draw) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    work = segments.prepare(row)
    samples = [
        torch.arange(len(sample) - 1) for sample in fr.unmerge(layout)
    ]  # of as many tokens; which ones costs nothing

    def one_pass() -> None:
        out = segments.attend(*inputs, work, SIZE**-0.5)
        torch.autograd.grad(out, inputs, upstream.transpose(1, 2))

    def n_passes() -> None:
        for sample in samples:
            n = len(sample)
            given = [x.detach()[:, :, :n].requires_grad_() for x in inputs]
            out = F.scaled_dot_product_attention(*given, is_causal=True)
            torch.autograd.grad(out, given, upstream[:, :, :n])

    def dense() -> None:
        out = F.scaled_dot_product_attention(*inputs, fr.dense_mask(row))
        torch.autograd.grad(out, inputs, upstream)

    calls = {"one pass": one_pass, "N passes": n_passes}
    return calls | ({"dense": dense} if 4 * HEADS * length**2 < DENSE_FITS else {})


def growth(turns: int, a_turn: Shape, run: Run, whole_steps: bool) -> dict[str, Any]:
    layout = conversation([a_turn[1:]] * turns)
    tree, samples = amount([layout]), amount_of_samples(fr.unmerge(layout))
    found: dict[str, Any] = {"tokens, one": tree.tokens, "tokens, N": samples.tokens}
    found |= {"pairs, one": tree.pairs, "pairs, N": samples.pairs}
    calls = attention(layout)
    for call in calls.values():
        call()
    for name, seconds in interleaved(calls, run.options.repeats, least_seconds=0.02).items():
        found[f"attention ms, {name}"] = 1e3 * statistics.median(seconds)
        found[f"attention MiB, {name}"] = peak(calls[name]).added / 2**20
    if whole_steps:
        made, _ = model("toy", run.device)
        case = Case(made, [layout])
        ours, theirs = measure(case, [ways.one_pass(case), ways.one_by_one(case)], run.options.repeats)
        assert (theirs.gradient_error or 1.0) < 1e-3, (ours, theirs)
        for name, one in (("one", ours), ("N", theirs)):
            found |= {f"step ms, {name}": one.median, f"step MiB, {name}": (one.added or 0) / 2**20}
    return found


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Slopes of logarithms over N; counted and measured beside the paper's."""
    said = {"one": "2 (eq. 9)", "N": "3 (eq. 7)"}
    found = []
    for way in ("one", "N"):
        full = "one pass" if way == "one" else "N passes"
        row = {"pass": full, "the paper's": said[way], "pairs": slope(rows, f"pairs, {way}")}
        row |= {"attention's time": slope(rows, f"attention ms, {full}"), "step's time": slope(rows, f"step ms, {way}")}
        row |= {"attention's memory": slope(rows, f"attention MiB, {full}"), "tokens": slope(rows, f"tokens, {way}")}
        found.append(row)
    return found


def slope(rows: list[dict[str, Any]], of: str) -> float | None:
    points = [(math.log(row["turns"]), math.log(row[of])) for row in rows if row["turns"] >= FROM and row.get(of)]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


# ---- lengths


def stored(turns: list[tuple[int, int, int]]) -> int:
    """How many tokens the paper's layout stores."""
    copies = sum(r for _, t, r in turns[:-1] if not t)  # without reasoning a response is its own context copy
    return sum(h + t + 2 * r for h, t, r in turns) - turns[-1][2] - copies


def lengths(n: int = 300) -> dict[str, Any]:
    """Random conversations, whose layouts must be as long as said; and how far equation 8 as printed is off."""
    draw, off = random.Random(0), []
    for _ in range(n):
        some = range(draw.randint(1, 20))
        turns = [(draw.randint(1, 40), draw.choice([0, 1, 9, 90]), draw.randint(1, 40)) for _ in some]
        assert len(conversation(turns)) == stored(turns), turns
        off.append(sum(h + r + 2 * t for h, t, r in turns) / stored(turns))
    equation_8 = [statistics.median(off), min(off), max(off)]
    return {"conversations": n, "as said": n, "equation 8 as printed, by what is stored": equation_8}


# ---- passes


class Pass(NamedTuple):
    """A sequence, its positions, who sees whom, and which tokens predict what."""

    ids: Tensor  # [S]
    positions: Tensor  # [S]
    visible: Tensor  # bool [S, S]
    sources: Tensor  # [T], in the order of turns
    labels: Tensor  # [T]


def causal(ids: list[int], sources: list[int]) -> Pass:
    every = torch.tensor(ids)
    at = torch.arange(len(ids))
    return Pass(every, at, at[:, None] >= at, torch.tensor(sources), every[torch.tensor(sources) + 1])


def passes_of(layout: fr.Layout, turns: list[tuple[int, int, int]]) -> dict[str, list[Pass]]:
    """The paper's passes, and ours with what may be got wrong in it."""
    samples = fr.unmerge(layout)
    whole = [sample.prompt_ids + sample.target_ids for sample in samples]
    starts = [len(sample.prompt_ids) - 1 for sample in samples]
    plain: list[int] = []
    predicting: list[int] = []
    for (h, _, _), sample in zip(turns, samples, strict=True):
        plain += sample.prompt_ids[-h:]
        predicting += range(len(plain) - 1, len(plain) - 1 + len(sample.target_ids))
        plain += sample.target_ids
    single = Pass(layout.input_ids, layout.position_ids, fr.dense_mask(layout), layout.target_source, layout.target_ids)
    shifted = ways.with_shifted_labels(layout).target_source
    return {
        "N passes": [causal(ids, list(range(a, len(ids) - 1))) for ids, a in zip(whole, starts, strict=True)],
        "one plain pass": [causal(plain, predicting)],
        "single pass": [single],
        "single pass, the paper's rule": [single._replace(visible=fr.dense_mask(layout, mask="turn_role"))],
        "single pass, sequential positions": [single._replace(positions=torch.arange(len(layout)))],
        "single pass, labels shifted": [single._replace(sources=shifted)],
    }


def nll_of(made: Any, some: list[Pass]) -> Tensor:
    """Of every target, by a stock model under the masks as they are said: [T]."""
    found = []
    for one in some:
        mask = torch.zeros(one.visible.shape, dtype=made.dtype).masked_fill(~one.visible, -torch.inf)[None, None]
        given = {"input_ids": one.ids[None], "position_ids": one.positions[None], "attention_mask": mask}
        hidden = made.model(**given, use_cache=False).last_hidden_state[0]
        found.append(F.cross_entropy(made.lm_head(hidden[one.sources]), one.labels, reduction="none"))
    return torch.cat(found)


def passes(turns: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Every pass on one conversation, and on the same with other tokens in the first turn's reasoning."""
    made = peaked()
    layout = conversation(turns, made.config.vocab_size)
    first_reasoning = (layout.turn == 0) & (layout.role == int(fr.Role.REASONING))
    ids = torch.where(first_reasoning, (layout.input_ids + 1) % made.config.vocab_size, layout.input_ids)
    labels = layout.target_ids.clone()
    labels[: turns[0][1]] = ids[first_reasoning]
    other = replace(layout, input_ids=ids, target_ids=labels)
    by_turn: dict[str, Callable[[fr.Layout], Tensor]] = {
        name: lambda one, name=name: nll_of(made, passes_of(one, turns)[name]) for name in passes_of(layout, turns)
    }
    patched = fr.patch(copy.deepcopy(made), "segments")
    by_turn["single pass, through patch"] = lambda one: -fr.token_logprobs(patched, fr.collate([one]))[: len(labels)]
    second = layout.target_turn == 1
    rows: list[dict[str, Any]] = []
    expected: list[Tensor] = []
    with true_float64():
        for name, nll in by_turn.items():
            model = patched if "patch" in name else made
            model.zero_grad()
            (mean := (found := nll(layout)).mean()).backward()
            loss = float(mean.detach())
            grads = [p.grad.clone() for p in model.parameters()]
            expected = expected or grads
            moved = float((nll(other) - found).detach()[second].abs().max())
            row = {"pass": name, "loss": loss, "loss off by": abs(loss / (rows[0]["loss"] if rows else loss) - 1)}
            row |= {"gradients off by": relative_l2(grads, expected), "turn 2 moved by turn 1's reasoning": moved}
            row["equal"] = "yes" if row["gradients off by"] < 1e-9 else "no"
            rows.append(row | {"leaks": "yes" if moved > 1e-9 else "no"})
    return rows


def peaked() -> Any:
    """A small model in fp64 whose attention is not all but uniform, as it is with weights as they are drawn."""
    made = fr.unpatch(model("tiny", torch.device("cpu"))[0])
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(10)
    return made.double()


# ---- what is printed


def draw(grown: dict[str, list[dict[str, Any]]], figure: Any) -> None:
    """A line of panels for each kind of turn."""
    figure.set_size_inches(13, 3.4 * len(grown))
    colors = {"one": "#1f4e79", "one pass": "#1f4e79", "N": "#d68910", "N passes": "#d68910", "dense": "#b03a2e"}
    panels = [
        ("visible pairs", {name: f"pairs, {name}" for name in ("one", "N")}),
        ("attention, ms", {name: f"attention ms, {name}" for name in ("one pass", "N passes", "dense")}),
        ("attention, MiB", {name: f"attention MiB, {name}" for name in ("one pass", "N passes", "dense")}),
        ("a whole step, ms", {name: f"step ms, {name}" for name in ("one", "N")}),
    ]
    for line, (of_a_turn, rows) in zip(figure.subplots(len(grown), 4, squeeze=False), grown.items(), strict=True):
        turns = [row["turns"] for row in rows]
        for axes, (title, lines) in zip(line, panels, strict=True):
            logarithmic(axes, title, "turns", "", turns)
            for name, column in lines.items():
                if points := [(row["turns"], row[column]) for row in rows if row.get(column, 0) > 0.01]:
                    label = {"one": "one pass", "N": "N passes"}.get(name, name)
                    axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colors[name], label=label)
            if axes.lines:
                axes.legend(fontsize=7, frameon=False)
        line[0].set_ylabel(f"turns of {of_a_turn}")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--turns", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    run.option("--lengths", nargs="+", default=["16/32/16"], help="tokens of h/t/r in every turn (%(default)s)")
    run.option("--steps-to", type=int, default=64, help="whole steps up to these turns (%(default)s)")
    options = run.start(arguments)
    grown: dict[str, list[dict[str, Any]]] = {}
    slopes: dict[str, list[dict[str, Any]]] = {}
    for lengths_of_turns in options.lengths:
        rows = []
        for turns in options.turns:
            a_turn = shape(f"{turns} x {lengths_of_turns}")
            about = {"turns": turns, "lengths": lengths_of_turns}
            rows.append(run.cell(about, growth, turns, a_turn, run, turns <= options.steps_to))
        grown[lengths_of_turns], slopes[lengths_of_turns] = rows, exponents(rows)
        run.table(f"growth, turns of {lengths_of_turns}", rows, hidden=["lengths"])
        run.table(f"exponents over N >= {FROM}, turns of {lengths_of_turns}", slopes[lengths_of_turns])
    run.table("tokens stored, as said and counted", [lengths()])
    run.table("passes over one conversation, in fp64", found := passes([(5, 9, 4), (6, 8, 5), (4, 7, 3)]))
    return run.finish(lambda figure: draw(grown, figure), growth=grown, exponents=slopes, passes=found)


if __name__ == "__main__":
    main()
