"""What one pass costs on your machine, with your model and data, against the N samples: one by one, and on a GPU packed
side by side through flash attention, which is what one pass has to beat.

    flexreason bench Qwen/Qwen3-0.6B --data chats.jsonl --checkpointing
    flexreason bench ./config.json --turns 16 --lengths 64/256/64

A step is forward and backward, without an optimizer. Every way has the same targets, makes logits for these alone, and
must give the same loss before it is timed. Without data, conversations of random tokens are taken.
"""

import argparse
import inspect
import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from flexreason.attention.registry import find_decoder
from flexreason.attention.tree_row import choose_backend
from flexreason.data import excerpt
from flexreason.data.work import Amount, Shape, shape_of
from flexreason.draw import draw_table
from flexreason.head import Head, weighted_nll
from flexreason.layout import Layout, unmerge
from flexreason.load import load_model
from flexreason.memory import peak_bytes
from flexreason.patching import find_patch, find_root
from flexreason.proof.conditions import suspended, without_dropout
from flexreason.proof.gate import patch
from flexreason.row import collate
from flexreason.sample import Sample
from flexreason.tree import lay_out

SAME = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
"""How far losses of two ways may be apart, relative: no nonsense is to be timed. `flexreason verify` is the proof."""

TOKENS = {"cpu": 4096, "cuda": 16384}
"""Of the row, unless --tokens says otherwise."""

PACKED = "packed_samples"
"""The name of attention over sequences that lie side by side."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a name, a folder, or a config.json (random weights)")
    parser.add_argument("--backend", nargs="+", default=["auto"], help="one or several of auto, segments, flex, dense")
    parser.add_argument("--loss", choices=["model", "chunked"], default="model", help="in all ways; model if not given")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in all ways")
    parser.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16, float16, float64")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of the row; as many conversations as fit are taken")
    parser.add_argument("--repeats", type=int, default=5, help="of every way, in turn (%(default)s)")
    parser.add_argument("--turns", type=int, help="of each random conversation; 8 if not given")
    parser.add_argument("--lengths", metavar="H/T/R", help="tokens a turn: human, reasoning, response; 64/256/64")
    parser.add_argument(
        "--seed", type=int, default=0, help="of random conversations, and of weights where there are none"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    excerpt.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    excerpt.check(options)
    for name in ("tokens", "repeats", "turns"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise ValueError(f"--{name}: expected at least 1, found {given}")
    if options.data is not None and (options.turns or options.lengths):
        raise ValueError("--turns and --lengths are of random conversations; leave --data out, or them")
    model, notes = load_model(options.model, options.dtype, options.device, options.seed, options.trust_remote_code)
    root = find_root(model)
    vocabulary = root.config.get_text_config().vocab_size
    tokens = options.tokens or TOKENS.get(root.device.type, TOKENS["cpu"])
    if options.data is None:
        conversations = random_conversations(options, vocabulary, tokens)
    else:
        _, conversations, more = excerpt.conversations(options, vocabulary)
        notes += more
    layouts = that_fit(conversations, tokens, notes)
    shape = counted(options.model, notes)
    if options.checkpointing:
        enable: Any = getattr(root, "activation_checkpointing_enable", None) or root.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    with without_dropout(model.train(), notes):
        found = measure(model, layouts, options.backend, options.loss, options.repeats, notes)
    report = Report(
        model=options.model,
        device=_name(root.device),
        dtype=str(root.dtype).removeprefix("torch."),
        torch=torch.__version__,
        conversations=len(layouts),
        turns=sum(layout.n_samples for layout in layouts),
        tree=amount(layouts),
        samples=amount([lay_out([sample]) for layout in layouts for sample in unmerge(layout)]),
        shape=shape,
        ways=found,
        notes=notes,
    )
    print(json.dumps(report.as_json()) if options.json else report)
    return 0 if report.ok else 1


# ---- what is computed


def random_conversations(options: argparse.Namespace, vocabulary: int, tokens: int) -> list[list[Sample]]:
    """As many as fill the row, at least one, all of the same lengths."""
    if not (given := re.fullmatch(r"(\d+)/(\d+)/(\d+)", options.lengths or "64/256/64")):
        raise ValueError(f"--lengths: expected tokens as 64/256/64, found {options.lengths!r}")
    h, t, r = map(int, given.groups())
    if not h or not r:
        raise ValueError(f"--lengths: expected what humans say and what is answered, found {options.lengths}")
    draw = random.Random(options.seed)

    def ids(n: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(n)]

    def conversation() -> list[Sample]:
        history: list[int] = []
        samples = []
        for _ in range(options.turns or 8):
            history, response = history + ids(h), ids(r)
            samples.append(Sample(history, ids(t) + response))
            history = history + response
        return samples

    first = conversation()
    return [first, *(conversation() for _ in range(tokens // len(lay_out(first)) - 1))]


def that_fit(conversations: Sequence[list[Sample]], tokens: int, notes: list[str]) -> list[Layout]:
    """Those that fit into a row, as they come; the shortest, if none does."""
    layouts = [lay_out(samples) for samples in conversations]
    chosen, free = [], tokens
    for layout in layouts:
        if len(layout) <= free:
            chosen.append(layout)
            free -= len(layout)
    if not chosen:
        chosen = [min(layouts, key=len)]
        notes.append(f"no conversation fits into {tokens} tokens; the shortest, of {len(chosen[0])}, is taken whole")
    elif len(chosen) < len(layouts):
        notes.append(f"{len(chosen)} of {len(layouts)} conversations, which fit into a row of {tokens} tokens")
    return chosen


def counted(model: str, notes: list[str]) -> Shape | None:
    """What a model's work is counted from, where that can be told."""
    try:
        shape = shape_of(model)
    except ValueError as error:
        notes.append(f"work is not counted: {error}")
        return None
    if shape.note:
        notes.append(f"of work: {shape.note}")
    return shape


def amount(layouts: Sequence[Layout]) -> Amount:
    return Amount(
        tokens=sum(map(len, layouts)),
        pairs=sum(int((layout.position_ids + 1).sum()) for layout in layouts),
        targets=sum(len(layout.target_ids) for layout in layouts),
    )


# ---- ways to compute it


@dataclass(frozen=True)
class Found:
    """What a way took, or why it took nothing."""

    name: str
    loss: float | None = None
    ms: tuple[float, ...] = ()  # of every repeat
    peak: int | None = None  # bytes
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.ms)


Step = Callable[[], float]
"""Forward and backward; the loss."""


def measure(
    model: nn.Module, layouts: Sequence[Layout], backends: Sequence[str], loss: str, repeats: int, notes: list[str]
) -> list[Found]:
    """Every way once for its loss, once for its memory, and then all in turn; the N samples one by one come first."""
    root = find_root(model)
    samples = [sample for layout in layouts for sample in unmerge(layout)]
    steps: dict[str, Step] = {"N samples, one by one": partial(one_by_one, root, samples, loss)}
    why = unfit_to_pack(root)
    if why:
        notes.append(f"N samples, packed: left out, since {why}")
    else:
        steps["N samples, packed"] = partial(packed, root, pack(samples, sum(map(len, layouts)), root.device), loss)
    row = {key: value.to(root.device) for key, value in collate(layouts).items()}
    for backend in backends:
        steps[f"one pass, {patched(model, backend, loss)}"] = partial(one_pass, model, row, backend, loss)
    found = {name: _tried(name, step, root) for name, step in steps.items()}
    running = [name for name, one in found.items() if not one.failed]
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(repeats):
        for name in running:
            root.zero_grad()
            started = _now(root.device)
            steps[name]()
            times[name].append(1e3 * (_now(root.device) - started))
    return [replace(one, ms=tuple(times.get(name, ()))) for name, one in found.items()]


def _tried(name: str, step: Step, root: PreTrainedModel) -> Found:
    try:
        root.zero_grad()
        loss = step()
        root.zero_grad()
        with peak_bytes(root.device) as peak:
            step()
            _now(root.device)
            return Found(name, loss=loss, peak=peak())
    except (RuntimeError, ValueError) as error:  # out of memory, or kernels that are not made for this model or device
        root.zero_grad()
        return Found(name, failed=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def patched(model: nn.Module, backend: str, loss: str) -> str:
    """Patch a model; the backend that "auto" stands for."""
    root = find_root(patch(model, backend, loss=loss))
    return choose_backend(backend, root.device, root.dtype)


def one_pass(model: nn.Module, row: dict[str, Tensor], backend: str, loss: str) -> float:
    """All samples in one row."""
    if (ours := find_patch(model)) is not None:
        ours.backend = backend
    out = model(**row).loss
    out.backward()
    return float(out.detach())


def one_by_one(root: PreTrainedModel, samples: Sequence[Sample], loss: str) -> float:
    """Every sample by itself through the untouched model."""
    n_targets = sum(len(sample.target_ids) for sample in samples)
    total = 0.0
    with suspended(root):
        for sample in samples:
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]], device=root.device)
            output = find_decoder(root)(input_ids=ids, use_cache=False)
            states = output[0][0, len(sample.prompt_ids) - 1 : -1]
            labels = torch.tensor(sample.target_ids, device=root.device)
            total += _back(Head(root, output), states, labels, n_targets, loss)
    return total


@dataclass(frozen=True, eq=False)
class Pack:
    """Samples side by side: P tokens, of which T predict."""

    ids: Tensor  # [1, P]
    positions: Tensor  # [1, P]
    offsets: Tensor  # int32 [samples + 1]
    longest: int
    sources: Tensor  # [T]
    labels: Tensor  # [T]


def pack(samples: Sequence[Sample], length: int, device: torch.device) -> list[Pack]:
    """Samples in as few packs of a length as they fill in turn; one that is longer has a pack of its own."""
    packs: list[list[Sample]] = [[]]
    free = length
    for sample in samples:
        n = len(sample.prompt_ids) + len(sample.target_ids)
        if n > free and packs[-1]:
            packs.append([])
            free = length
        packs[-1].append(sample)
        free -= n
    return [_packed(some, device) for some in packs]


def _packed(samples: Sequence[Sample], device: torch.device) -> Pack:
    whole = [[*sample.prompt_ids, *sample.target_ids] for sample in samples]
    offsets = [0, *accumulate(map(len, whole))]
    sources = [
        torch.arange(stop - 1 - len(sample.target_ids), stop - 1)
        for stop, sample in zip(offsets[1:], samples, strict=True)
    ]
    return Pack(
        ids=torch.tensor([[token for ids in whole for token in ids]], device=device),
        positions=torch.cat([torch.arange(len(ids)) for ids in whole])[None].to(device),
        offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        longest=max(map(len, whole)),
        sources=torch.cat(sources).to(device),
        labels=torch.tensor([token for sample in samples for token in sample.target_ids], device=device),
    )


def packed(root: PreTrainedModel, packs: Sequence[Pack], loss: str) -> float:
    """The samples side by side through the model with attention of variable lengths, as those who pack have it."""
    n_targets = sum(len(one.labels) for one in packs)
    total = 0.0
    with suspended(root):
        before = root.config._attn_implementation
        root.set_attn_implementation(PACKED)
        try:
            for one in packs:
                _side_by_side.current = one
                output = find_decoder(root)(input_ids=one.ids, position_ids=one.positions, use_cache=False)
                total += _back(Head(root, output), output[0][0, one.sources], one.labels, n_targets, loss)
        finally:
            root.set_attn_implementation(before)
    return total


def unfit_to_pack(root: PreTrainedModel) -> str:
    """Why the samples are not packed here, or nothing."""
    if root.device.type != "cuda":
        return "flash attention of variable lengths is for GPUs"
    if root.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention has no {str(root.dtype).removeprefix('torch.')}"
    return ""


class _SideBySide:
    """Attention within each sequence of the pack that is being computed, backward included."""

    current: Pack

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        from torch.nn.attention.varlen import varlen_attn

        if softcap is not None or s_aux is not None:
            raise NotImplementedError("flash attention of variable lengths has no softcap and no sinks")
        # Until torch 2.12 groups of heads are taken as they come; since then they are announced.
        more: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        one = self.current
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        within = (-1 if sliding_window is None else sliding_window - 1, 0)
        ends = (one.offsets, one.offsets, one.longest, one.longest)
        out: Any = varlen_attn(q, k, v, *ends, scale=scaling, window_size=within, **more)
        return out[None], None


_side_by_side = _SideBySide()
AttentionInterface.register(PACKED, _side_by_side)


def _back(head: Head, states: Tensor, labels: Tensor, n_targets: int, loss: str) -> float:
    """Backward of the share that some targets have in the mean over all; that share."""
    if loss == "chunked":
        weight = torch.full((len(labels),), 1 / n_targets, device=states.device)
        share = weighted_nll(head, states, labels, weight)[0]
    else:
        share = nn.functional.cross_entropy(head(states).float(), labels, reduction="sum") / n_targets
    share.backward()
    return float(share.detach())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a CPU ({platform.machine()})"


# ---- what is said of it


@dataclass(frozen=True)
class Report:
    """What was computed, on what, and how long it took."""

    model: str
    device: str
    dtype: str
    torch: str
    conversations: int
    turns: int
    tree: Amount
    samples: Amount
    shape: Shape | None
    ways: list[Found]
    notes: list[str]

    @property
    def token_ratio(self) -> float:
        return self.samples.tokens / self.tree.tokens

    @property
    def work_ratio(self) -> float | None:
        return None if self.shape is None else self.shape.work(self.samples) / self.shape.work(self.tree)

    def differs(self, one: Found) -> bool:
        """Whether a way has another loss than the first that ran, which are the N samples one by one if they fit."""
        losses = [way.loss for way in self.ways if way.loss is not None]
        return one.loss is not None and abs(one.loss / losses[0] - 1) > SAME[getattr(torch, self.dtype)]

    @property
    def reference(self) -> Found | None:
        """The N samples, as whoever does without us would compute them best: the faster way of those that ran."""
        ran = [one for one in self.ways if one.ms and one.name.startswith("N samples") and not self.differs(one)]
        return min(ran, key=lambda one: one.median, default=None)

    @property
    def ok(self) -> bool:
        """Whether one pass ran, with the samples' loss wherever it did."""
        ran = [one for one in self.ways if one.ms and one.name.startswith("one pass")]
        return bool(ran) and not any(map(self.differs, ran))

    def speed_up(self, one: Found) -> float | None:
        """By the N samples, repeat by repeat."""
        if (reference := self.reference) is None or not one.ms:
            return None
        return statistics.median(a / b for a, b in zip(reference.ms, one.ms, strict=True))

    def as_json(self) -> dict[str, Any]:
        ways = [
            {**asdict(one), "median_ms": one.median if one.ms else None, "speed_up": self.speed_up(one)}
            for one in self.ways
        ]
        ratios = {"token_ratio": self.token_ratio, "work_ratio": self.work_ratio, "ok": self.ok}
        named = {"tree": self.tree._asdict(), "samples": self.samples._asdict(), "ways": ways}
        return {**asdict(self), **named, **ratios}

    def __str__(self) -> str:
        rows = [["", "ms", "speed-up", "of the work's", "memory", "loss"]]
        for one in self.ways:
            if not one.ms:
                rows.append([one.name, "", "", "", "", one.failed])
                continue
            faster, share = self.speed_up(one), ""
            if faster and self.work_ratio and one.name.startswith("one pass"):
                share = f"{faster / self.work_ratio:.0%}"
            memory = f"{(one.peak or 0) / 2**30:.2f} GiB"
            loss = f"{one.loss:.6f}" + (", which is another" if self.differs(one) else "")
            rows.append([one.name, f"{one.median:,.0f}", f"{faster:.2f}" if faster else "", share, memory, loss])
        times_less = f"{self.token_ratio:.2f} of tokens" + (
            f", {self.work_ratio:.2f} of work" if self.work_ratio else ""
        )
        lines = [
            f"{self.model}, {self.dtype}, on {self.device}, torch {self.torch}",
            f"{self.turns} turns in {_count(self.conversations)}: {self.tree.tokens:,} tokens in one pass, "
            f"{self.samples.tokens:,} in the samples",
            f"So many times less: {times_less}",
            "",
            draw_table(rows),
            *(["", *(f"- {note}" for note in self.notes)] if self.notes else []),
        ]
        if not self.ok:
            lines += ["", "One pass did not run, or has another loss: `flexreason verify` tells why."]
        return "\n".join(lines)


def _count(n: int) -> str:
    return "one conversation" if n == 1 else f"{n} conversations"
