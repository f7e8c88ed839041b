"""Training steps on a GPU: one pass over the tree against the N samples packed side by side.

    python benchmarks/gpu_step.py                        # Qwen3 of 0.6B and 4B shape, 8, 16 and 30 turns and an agent
    python benchmarks/gpu_step.py --only 4B              # cells whose name holds these letters
    python benchmarks/gpu_step.py --optimizer            # with a step of fused AdamW in every way
    python benchmarks/gpu_step.py --device cpu --small   # a rehearsal

Random weights in bf16 (fp32 on a CPU), gradient checkpointing of every layer as users have it, forward and backward
and no optimizer unless asked for. The N samples are one sequence through torch's variable-length flash attention, or
as few as fit the card (*packs*). The head is the same in all: logits for target rows only, a chunk at a time, by the
functions of `flexreason.model.head`. Loss and gradients of the first and the last layer are compared before anything is
timed.

*plain* is one causal sequence of as many tokens and targets as the row. *queries* is attention replaced by a function
that returns the queries, on a row and on a plain sequence. Work counts 6 x P x tokens + 6 x V x D x targets +
12 x layers x query heads x head size x visible pairs: no recompute, neither that of checkpointing nor that inside
flash attention. MFU is work by time, by the rate of a bf16 matrix product of 8192^3 on the same card, and by 989
TFLOP/s. *token ratio* is tokens of the samples by tokens of the tree.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

import flexreason as fr
from flexreason.attention import flex, segments
from flexreason.attention.registry import BACKENDS
from flexreason.model.head import Head, weighted_nll
from flexreason.model.hooks import find_patch
from flexreason.proof.float64 import relative_l2
from kernel import SHAPES, Packed, causal, conversation, flash, flash_name, last_tokens, packed_paths, pairs_of, scaled
from measure import (
    Budget,
    free,
    in_words,
    median_ratio,
    on_a_gpu,
    peak_gib,
    print_json,
    print_table,
    seconds_of,
    tell,
    timed,
)

MODELS = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
TINY = {"vocab_size": 512, "num_key_value_heads": 2, "head_dim": 16}

PEAK = 989e12
"""What the vendor says of bf16 on an H100 or H200, without sparsity."""

WRONG = {torch.bfloat16: 0.1, torch.float32: 1e-3}
"""Gradients further off than this are not timed: a wrong mask is off by more than half."""


@dataclass(frozen=True)
class Cell:
    model: str
    length: int
    shape: str

    @property
    def name(self) -> str:
        return f"{self.model}, {in_words(self.length)}, {self.shape}"


def cells(small: bool) -> list[Cell]:
    if small:
        return [Cell("tiny", 384, "8 turns")]
    lengths = [("0.6B", 2**14), ("4B", 2**13), ("0.6B", 2**15), ("4B", 2**14)]
    return [
        Cell(model, length, shape)
        for model, length in lengths
        for shape in ("16 turns", "30 turns", "8 turns", "agent")
    ]


# ---- models and their attention

PACKED, QUERIES, PLAIN = "packed_samples", "queries_returned", "sdpa"


def packed_attention(module, query, key, value, attention_mask, packed: Packed, **kwargs):
    """Causal attention within each of the sequences that lie side by side."""
    return flash(*(rearrange(x, "1 h s d -> s h d") for x in (query, key, value)), packed)[None], None


def queries_returned(module, query, key, value, attention_mask, **kwargs):
    return _queries(query, key, value), None


def _queries(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """Attention that costs nothing; keys and values take part, so that their projections are computed."""
    return q.transpose(1, 2) + 0 * (k.sum() + v.sum())


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(QUERIES, queries_returned)
FREE = {"queries": SimpleNamespace(MASKS=("interval",), prepare=flex.prepare, attend=_queries)}
"""A backend that makes flex's mask and computes nothing."""


def make(name: str, device: torch.device) -> Qwen3ForCausalLM:
    """A model of one of the shapes, on its device and patched; it takes rows and, under other names, packed samples."""
    size = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, **MODELS[name]}
    config = Qwen3Config(
        **(size | TINY if name == "tiny" else size),
        max_position_embeddings=2**21,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            model = Qwen3ForCausalLM(config).train()
    finally:
        torch.set_default_dtype(usual)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    return fr.patch(model, "segments", loss="chunked")


def flops(m: Qwen3ForCausalLM, tokens: int, targets: int, pairs: int) -> float:
    config = m.config
    products = sum(p.numel() for p in m.model.layers.parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size
    heads = config.num_hidden_layers * config.num_attention_heads * config.head_dim
    return 6.0 * products * tokens + 6.0 * head * targets + 12.0 * heads * pairs


def matmul_peak(device: torch.device) -> float:
    """FLOP/s of one bf16 matrix product of 8192^3."""
    n = 8192 if device.type == "cuda" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2.0 * n**3 / statistics.median(timed({"": lambda: a @ b}, device, 1.0)[""])


# ---- steps

Step = Callable[[], Tensor]
"""Forward and backward; the loss."""


def over_row(m: Qwen3ForCausalLM, row: dict[str, Tensor], backend: str) -> Step:
    def step() -> Tensor:
        find_patch(m).backend = backend
        m.config._attn_implementation = PLAIN
        m.zero_grad()
        loss = m(**row).loss
        loss.backward()
        return loss.detach()

    return step


@dataclass(eq=False)
class Pack:
    """Sequences side by side with their targets: T tokens that predict, what they are to predict, and weights."""

    ids: Tensor  # [1, P]
    positions: Tensor  # [1, P]
    packed: Packed
    sources: Tensor
    labels: Tensor
    weight: Tensor


def over_packs(m: Qwen3ForCausalLM, packs: list[Pack], implementation: str = PACKED) -> Step:
    def step() -> Tensor:
        m.config._attn_implementation = implementation
        m.zero_grad()
        total = torch.zeros((), device=packs[0].ids.device)
        for pack in packs:
            output = m.model(input_ids=pack.ids, position_ids=pack.positions, packed=pack.packed, use_cache=False)
            loss, _ = weighted_nll(Head(m, output), output[0][0, pack.sources], pack.labels, pack.weight)
            loss.backward()
            total += loss.detach()
        return total

    return step


def pack_samples(layout: fr.Layout, device: torch.device, n_packs: int) -> list[Pack]:
    """The N samples in packs of about equal tokens."""
    lasts = last_tokens(layout)
    targets = layout.target_turn.bincount()
    lengths = layout.position_ids[lasts] + 1
    number = (lengths.cumsum(0) - 1) * n_packs // int(lengths.sum())
    packs = []
    for pack in number.unique().tolist():
        chosen = (number == pack).nonzero().squeeze(1)
        packed = packed_paths(layout, lasts[chosen], device)
        ends = packed.begins[1:].tolist()
        sources = [torch.arange(end - 1 - n, end - 1) for end, n in zip(ends, targets[chosen].tolist(), strict=True)]
        index = packed.index.cpu()
        of_these = torch.isin(layout.target_turn, chosen)
        packs.append(
            Pack(
                layout.input_ids[index][None].to(device),
                layout.position_ids[index][None].to(device),
                packed,
                torch.cat(sources).to(device),
                layout.target_ids[of_these].to(device),
                torch.full((int(of_these.sum()),), 1 / len(layout.target_ids), device=device),
            )
        )
    return packs


def plain(row: dict[str, Tensor]) -> Pack:
    """One causal sequence of the row's tokens, with as many targets, predicted by tokens at the same places."""
    length, device = row["input_ids"].shape[1], row["input_ids"].device
    weight = row["target_weight"][0] / row["target_weight"].sum()
    packed = causal(length, device)
    return Pack(row["input_ids"], packed.index[None], packed, row["target_source"][0], row["labels"][0], weight)


def backends(m: Qwen3ForCausalLM, device: torch.device) -> list[str]:
    """Those that train here at a speed worth timing."""
    if device.type == "cpu":
        return ["segments"]
    heads = (m.config.num_attention_heads, m.config.num_key_value_heads, m.config.num_key_value_heads)
    q, k, v = (torch.empty(1, n, 8, m.config.head_dim, device=device, dtype=m.dtype) for n in heads)
    route = segments.route(q, k, v, None)
    if route.startswith("tiled"):
        print(f"  segments left out: {route}", flush=True)
        return ["flex"]
    return ["flex", "segments"]


def with_optimizer(step: Step, optimizer: torch.optim.Optimizer) -> Step:
    def whole() -> Tensor:
        loss = step()
        optimizer.step()
        return loss

    return whole


def gradients(m: Qwen3ForCausalLM) -> list[Tensor]:
    """Those of the first and the last layer."""
    last = f"layers.{m.config.num_hidden_layers - 1}."
    found = [p.grad for name, p in m.named_parameters() if "layers.0." in name or last in name]
    return [gradient.clone() for gradient in found]


# ---- the table


@dataclass(eq=False)
class Case:
    """A cell's model and row, and the steps that are compared."""

    cell: Cell
    m: Qwen3ForCausalLM
    device: torch.device

    def __post_init__(self) -> None:
        shape = scaled(SHAPES[self.cell.shape], self.cell.length)
        self.layout = conversation(shape, self.m.config.vocab_size)
        row = fr.collate([self.layout], length=self.cell.length)
        self.row = {name: tensor.to(self.device) for name, tensor in row.items()}
        self.n_packs = 1

    def expected(self, budget: Budget) -> tuple[Step, Tensor, list[Tensor], float | None] | None:
        """The samples' step in as few packs as fit, with its loss, gradients and peak of memory."""
        for self.n_packs in (1, 2, 4, 8, 16):
            step = over_packs(self.m, pack_samples(self.layout, self.device, self.n_packs))
            found: list[Tensor] = []
            peak, failed = budget.attempt(
                f"{self.cell.name}: {self.n_packs} packs",
                lambda step=step, found=found: (peak_gib(lambda: found.append(step()), self.device),),
            )
            if peak is not None:
                return step, found[0], gradients(self.m), peak[0]
            self.m.zero_grad()
            free()
            if failed != "out of memory":
                return None
        return None

    def samples_work(self) -> float:
        lengths = (self.layout.position_ids[last_tokens(self.layout)] + 1).tolist()
        pairs = sum(n * (n + 1) // 2 for n in lengths)
        return flops(self.m, sum(lengths), len(self.layout.target_ids), pairs)

    def tree_work(self) -> float:
        return flops(self.m, len(self.layout), len(self.layout.target_ids), pairs_of(self.layout))

    def plain_work(self) -> float:
        n = self.cell.length
        return flops(self.m, n, len(self.layout.target_ids), n * (n + 1) // 2)


COLUMNS = [
    *("cell", "way", "ms", "packed ms", "packs", "speed-up", "token ratio", "by tokens", "work ratio", "by work"),
    *("MFU", "MFU of 989", "plain ms", "plain MFU", "MFU / plain's", "queries / plain's"),
    *("GiB", "packed GiB", "gradient error", "loss error", "first step s", "failed"),
]


def table(case: Case, budget: Budget, seconds: float, peak: float, optimizer: bool) -> list[dict[str, Any]]:
    cell, m, device = case.cell, case.m, case.device
    print(f"\n{cell.name}: {len(case.layout):,} tokens for {case.layout.sample_tokens:,}", flush=True)
    expected = case.expected(budget)
    if expected is None:
        return [tell({"cell": cell.name, "way": "all", "failed": "the packed samples did not run"})]
    packed_step, loss, wanted, packed_peak = expected
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    for backend in backends(m, device):
        step = over_row(m, case.row, backend)
        rows[backend] = {"cell": cell.name, "way": backend}
        found, failed = budget.attempt(
            f"{cell.name}: {backend}", lambda step=step: compared(m, step, loss, wanted, device)
        )
        rows[backend] |= found or {"failed": failed}
        if found:
            steps[backend] = step
    if not steps:
        return [tell(row) for row in rows.values()]
    sequence = plain(case.row)
    calls: dict[str, Step] = {
        **steps,
        "packed": packed_step,
        "plain": over_packs(m, [sequence]),
        "queries": over_row(m, case.row, "queries"),
        "plain queries": over_packs(m, [sequence], QUERIES),
    }
    if optimizer:
        adamw = torch.optim.AdamW(m.parameters(), lr=0.0, weight_decay=0.0, fused=True)  # weights stay as they are
        calls = {name: with_optimizer(step, adamw) for name, step in calls.items()}
    times, failed = budget.attempt(f"{cell.name}: times", lambda: timed(calls, device, seconds))
    for backend in steps:
        if times is None:
            rows[backend] |= {"failed": failed}
        else:
            rows[backend] |= figures(case, backend, times, peak) | {"packed GiB": packed_peak}
    return [tell({name: row[name] for name in COLUMNS if name in row}) for row in rows.values()]


def compared(
    m: Qwen3ForCausalLM, step: Step, loss: Tensor, wanted: list[Tensor], device: torch.device
) -> dict[str, Any]:
    """How far a step's loss and gradients are off, and its peak of memory; raises if that is too far."""
    seconds = seconds_of(step, device)  # the first compiles
    found: list[Tensor] = []
    peak = peak_gib(lambda: found.append(step()), device)
    error = relative_l2(gradients(m), wanted)
    apart = float(abs(found[0] - loss) / loss)
    if not error < WRONG[m.dtype]:
        raise ArithmeticError(f"gradients are off by {error:.2g}, the loss by {apart:.2g}")
    return {"gradient error": error, "loss error": apart, "GiB": peak, "first step s": seconds}


def figures(case: Case, backend: str, times: dict[str, list[float]], peak: float) -> dict[str, Any]:
    layout, ours = case.layout, times[backend]
    speed_up = median_ratio(times["packed"], ours)
    token_ratio = layout.sample_tokens / len(layout)
    work_ratio = case.samples_work() / case.tree_work()
    rate = case.tree_work() / statistics.median(ours)
    plain_rate = case.plain_work() / statistics.median(times["plain"])
    return {
        "ms": statistics.median(ours) * 1e3,
        "packed ms": statistics.median(times["packed"]) * 1e3,
        "packs": case.n_packs,
        "speed-up": speed_up,
        "token ratio": token_ratio,
        "by tokens": speed_up / token_ratio,
        "work ratio": work_ratio,
        "by work": speed_up / work_ratio,
        "MFU": rate / peak,
        "MFU of 989": rate / PEAK,
        "plain ms": statistics.median(times["plain"]) * 1e3,
        "plain MFU": plain_rate / peak,
        "MFU / plain's": rate / plain_rate,
        "queries / plain's": median_ratio(times["queries"], times["plain queries"]),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = on_a_gpu(__doc__, seconds=360)
    parser.add_argument("--each", type=float, default=15.0, help="seconds for the repeats of a cell")
    parser.add_argument("--only", default="", help="only cells whose name holds this, such as 4B or agent")
    parser.add_argument("--optimizer", action="store_true", help="with a step of fused AdamW; weights do not move")
    options = parser.parse_args(arguments)
    budget, device = Budget(options.seconds), torch.device(options.device)
    peak = matmul_peak(device)
    print(f"a matrix product: {peak / 1e12:.3g} TFLOP/s; packed samples: {flash_name(device)}", flush=True)
    rows: list[dict[str, Any]] = []
    m, name = None, ""
    for cell in cells(options.small):
        if options.only not in cell.name or not budget.allows(cell.name, needs=0 if options.small else 30):
            continue
        if cell.model != name:
            m = None  # before the next is made
            free()
            m, name = make(cell.model, device), cell.model
            print(f"{name} made and patched, {budget.left:.0f} s left", flush=True)
        case, failed = budget.attempt(cell.name, lambda m=m, cell=cell: Case(cell, m, device))
        if case is None:
            rows.append(tell({"cell": cell.name, "way": "all", "failed": failed}))
            continue
        with mock.patch.dict(BACKENDS, FREE):
            rows += table(case, budget, options.each, peak, options.optimizer)
        m.zero_grad()
        del case
        free()
    title = f"steps with{'' if options.optimizer else 'out'} optimizer: one pass against packed samples"
    print_table(title, rows)
    budget.tell()
    print_json(
        benchmark="gpu_step",
        packed=flash_name(device),
        matmul_tflops=peak / 1e12,
        optimizer=options.optimizer,
        left_out=budget.left_out,
        steps=rows,
    )


if __name__ == "__main__":
    main()
