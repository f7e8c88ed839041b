"""Training steps on CPU: one pass over the tree against the N samples, and what attention and memory cost.

    python benchmarks/step.py                              # all tables: most of an hour on two cores
    python benchmarks/step.py --repeats 3 --shapes 8 16    # two shapes: minutes

A 4-layer, 256-wide Qwen3 (8 heads of 64 over 4 key heads), vocabulary 2048, fp32, random weights. *lean* runs the
N samples one by one and computes logits for target rows only; *naive* computes all logits. Work is counted as
6 x P x tokens + 6 x V x D x (rows with logits) + 14 x layers x query heads x head size x visible pairs, P being the
weights of the layers' matrix products, and tokens without padding. Gradients are compared before anything is timed.
*dense* is our own backend of that name: a bool mask, and logits for target rows only.
"""

import argparse
import copy
import statistics
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

import flexreason as fr
from flexreason.attention import segments
from flexreason.proof.float64 import relative_l2, saved_bytes
from measure import interleaved, median_ratio, print_json, print_table

SHAPES = {
    "8 x 64/256/64": [(64, 256, 64)] * 8,
    "16 x 64/256/64": [(64, 256, 64)] * 16,
    "30 x 150/60/30": [(150, 60, 30)] * 30,
    "2 x 64/256/64": [(64, 256, 64)] * 2,
}
HEADS, GROUPS, SIZE, LAYERS, WIDTH, VOCABULARY = 8, 4, 64, 4, 256, 2048
DENSE_FITS = 7500
"""Tokens up to which the dense backend is timed; above, its memory was seen to exceed 24 GiB."""


def model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=SIZE,
        max_position_embeddings=2**17,
        tie_word_embeddings=False,
    )
    return Qwen3ForCausalLM(config)


def conversation(shape: list[tuple[int, int, int]]) -> fr.Layout:
    generator = torch.Generator().manual_seed(0)
    return fr.lay_out_turns(
        [tuple(torch.randint(0, VOCABULARY, (n,), generator=generator) for n in turn) for turn in shape]
    )


def lengths(layout: fr.Layout) -> list[tuple[int, int]]:
    """(tokens, targets) of every sample."""
    return [(len(s.prompt_ids) + len(s.target_ids), len(s.target_ids)) for s in fr.unmerge(layout)]


# ---- work


def work(m: Qwen3ForCausalLM, tokens: int, logits: int, pairs: int) -> float:
    products = sum(p.numel() for p in m.model.layers.parameters() if p.dim() == 2)
    return 6 * products * tokens + 6 * VOCABULARY * WIDTH * logits + 14 * LAYERS * HEADS * SIZE * pairs


def pairs_of(layout: fr.Layout) -> int:
    return int((layout.position_ids + 1).sum())


def work_ratio(m: Qwen3ForCausalLM, layout: fr.Layout, *, naive: bool) -> float:
    samples = lengths(layout)
    theirs = work(
        m,
        sum(n for n, _ in samples),
        sum(n if naive else t for n, t in samples),
        sum(n * (n + 1) // 2 for n, _ in samples),
    )
    return theirs / work(m, len(layout), len(layout.target_ids), pairs_of(layout))


# ---- steps


def by_samples(m: Qwen3ForCausalLM, layout: fr.Layout, *, naive: bool):
    """The N samples one by one; the mean over all targets, as one backward a sample."""
    total = len(layout.target_ids)
    made = [
        (torch.tensor([s.prompt_ids + s.target_ids]), len(s.prompt_ids), torch.tensor(s.target_ids))
        for s in fr.unmerge(layout)
    ]

    def step() -> None:
        m.zero_grad()
        for ids, n_prompt, targets in made:
            if naive:
                logits = m(input_ids=ids, use_cache=False).logits[0, n_prompt - 1 : -1]
            else:
                hidden = m.model(input_ids=ids, use_cache=False).last_hidden_state
                logits = m.lm_head(hidden[0, n_prompt - 1 : -1])
            (F.cross_entropy(logits, targets, reduction="sum") / total).backward()

    return step


def by_row(m: Qwen3ForCausalLM, layout: fr.Layout):
    row = fr.collate([layout])

    def step() -> None:
        m.zero_grad()
        m(**row).loss.backward()

    return step


def causal_batch(m: Qwen3ForCausalLM, layout: fr.Layout):
    """A plain causal batch of about the same tokens and pairs: n sequences of length L."""
    length = round(2 * pairs_of(layout) / len(layout))
    n = max(1, round(len(layout) / length))
    ids = torch.randint(0, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(0))
    n_targets = len(layout.target_ids) // n

    def step() -> None:
        m.zero_grad()
        hidden = m.model(input_ids=ids, use_cache=False).last_hidden_state
        logits = m.lm_head(hidden[:, -n_targets - 1 : -1])
        F.cross_entropy(logits.flatten(0, 1), ids[:, -n_targets:].flatten()).backward()

    return step


def floor(m: Qwen3ForCausalLM, layout: fr.Layout):
    """The matrix products of the step alone, attention's at the speed of causal SDPA."""
    n, t = len(layout), len(layout.target_ids)
    weights = [p for p in m.model.layers.parameters() if p.dim() == 2]
    inputs = [(torch.randn(n, w.shape[1]), torch.randn(n, w.shape[0]), w.detach()) for w in weights]
    inputs.append((torch.randn(t, WIDTH), torch.randn(t, VOCABULARY), m.lm_head.weight.detach()))
    attention = causal_attention(pairs_of(layout))

    def step() -> None:
        for x, g, w in inputs:
            x @ w.T, g @ w, g.T @ x
        for _ in range(LAYERS):
            attention()

    return step


def check(m: Qwen3ForCausalLM, layout: fr.Layout) -> None:
    by_samples(m, layout, naive=False)()
    expected = [p.grad.clone() for p in m.parameters()]
    patched = copy.deepcopy(m)
    for backend in ("segments", "dense") if len(layout) <= DENSE_FITS else ("segments",):
        by_row(fr.patch(patched, backend), layout)()
        assert relative_l2([p.grad for p in patched.parameters()], expected) < 1e-4, backend


def steps(repeats: int) -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        layout = conversation(shape)
        stock = model()
        check(stock, layout)
        with_segments, with_dense = fr.patch(copy.deepcopy(stock), "segments"), fr.patch(copy.deepcopy(stock), "dense")
        calls = {
            "single": by_row(with_segments, layout),
            "lean": by_samples(stock, layout, naive=False),
            "naive": by_samples(stock, layout, naive=True),
            "dense": by_row(with_dense, layout),
            "causal": causal_batch(stock, layout),
            "floor": floor(stock, layout),
        }
        if len(layout) > DENSE_FITS:  # 8 heads of S x S scores, masks and their gradients
            del calls["dense"]
        seconds = interleaved(calls, repeats)
        single = seconds["single"]
        lean_work, naive_work = (work_ratio(stock, layout, naive=naive) for naive in (False, True))
        lean, naive = median_ratio(seconds["lean"], single), median_ratio(seconds["naive"], single)
        rows.append(
            {
                "shape": name,
                "single ms": statistics.median(single) * 1e3,
                "lean": lean,
                "work": lean_work,
                "lean / work": lean / lean_work,
                "naive": naive,
                "its work": naive_work,
                "naive / work": naive / naive_work,
                "dense": median_ratio(seconds["dense"], single) if "dense" in seconds else "not run",
                "causal batch of equal work": median_ratio(seconds["dense"], seconds["causal"])
                if "dense" in seconds
                else "not run",
                "single / floor": median_ratio(single, seconds["floor"]),
            }
        )
    return rows


# ---- attention alone


def heads(length: int) -> list[torch.Tensor]:
    return [torch.randn(1, length, h, SIZE).transpose(1, 2).requires_grad_() for h in (HEADS, GROUPS, GROUPS)]


def causal_attention(pairs: int):
    """`is_causal` SDPA, forward and backward, on one sequence with as many pairs; key heads repeated as models do."""
    length = round((2 * pairs) ** 0.5)
    q, k, v = heads(length)
    upstream = torch.randn(1, HEADS, length, SIZE)

    def call() -> None:
        repeated = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, *repeated, is_causal=True)
        torch.autograd.grad(out, [q, k, v], upstream)

    return call


def work_list(row: dict[str, torch.Tensor]) -> tuple:
    """What is made of a row when it is first asked for."""
    table = segments.prepare(row)
    return table.rectangles, table.diagonal


def attention(repeats: int) -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        layout = conversation(shape)
        row = fr.collate([layout])
        length = row["until"].shape[1]
        table = segments.prepare(row)
        q, k, v = heads(length)
        upstream = torch.randn(1, length, HEADS, SIZE)

        def ours(q=q, k=k, v=v, table=table, upstream=upstream) -> None:
            torch.autograd.grad(segments.attend(q, k, v, table, SIZE**-0.5), [q, k, v], upstream)

        seconds = interleaved({"ours": ours, "causal": causal_attention(pairs_of(layout))}, repeats)
        prepared = statistics.median(interleaved({"": lambda row=row: work_list(row)}, repeats)[""])
        rows.append(
            {
                "shape": name,
                "segments ms": statistics.median(seconds["ours"]) * 1e3,
                "causal SDPA of equal pairs ms": statistics.median(seconds["causal"]) * 1e3,
                "ratio": median_ratio(seconds["ours"], seconds["causal"]),
                "rectangles": len(table.rectangles),
                "work list ms a row": prepared * 1e3,
            }
        )
    return rows


# ---- the rest of the step


def queries_returned(module, query, key, value, attention_mask, **kwargs):
    """Attention that costs nothing; keys and values take part, so that their projections are computed."""
    return query.transpose(1, 2) + 0 * (key.sum() + value.sum()), None


def rest(repeats: int) -> list[dict]:
    """Attention replaced by a function that returns the queries: a tree row against a plain row of the same S and T."""
    AttentionInterface.register("queries_returned", queries_returned)
    with mock.patch.object(segments, "attend", lambda q, k, v, *rest: queries_returned(None, q, k, v, None)[0]):
        return _rest(repeats)


def _rest(repeats: int) -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        layout = conversation(shape)
        stock = model()
        patched = fr.patch(copy.deepcopy(stock), "segments")
        stock.set_attn_implementation("queries_returned")
        row = fr.collate([layout])
        ids, t = row["input_ids"], row["labels"].shape[1]

        def plain(stock=stock, ids=ids, t=t) -> None:
            stock.zero_grad()
            hidden = stock.model(
                input_ids=ids, attention_mask=torch.empty(1, 1, 0, 0), use_cache=False
            ).last_hidden_state
            targets = ids[0, :t] if t <= ids.shape[1] else ids[0].repeat(2)[:t]
            logits = stock.lm_head(hidden[0, :t] if t <= ids.shape[1] else hidden[0].repeat(2, 1)[:t])
            F.cross_entropy(logits, targets).backward()

        seconds = interleaved({"tree": by_row(patched, layout), "plain": plain}, repeats)
        rows.append(
            {
                "shape": name,
                "tree ms": statistics.median(seconds["tree"]) * 1e3,
                "plain ms": statistics.median(seconds["plain"]) * 1e3,
                "ratio": median_ratio(seconds["tree"], seconds["plain"]),
            }
        )
    return rows


# ---- memory


def decoder_bytes(m: Qwen3ForCausalLM, **inputs) -> float:
    """What the decoder keeps for backward, by token of its input; parameters left out."""
    return saved_bytes(lambda: m.model(**inputs)[0], m.parameters()) / inputs["input_ids"].shape[1]


def memory() -> list[dict]:
    rows = []
    for name, shape in SHAPES.items():
        layout = conversation(shape)
        longest = max(fr.unmerge(layout), key=lambda s: len(s.prompt_ids) + len(s.target_ids))
        ids = torch.tensor([longest.prompt_ids + longest.target_ids])
        row = {key: value for key, value in fr.collate([layout]).items() if "labels" not in key}
        for checkpointing in (False, True):
            m = model().train()
            if checkpointing:
                enable = getattr(m, "activation_checkpointing_enable", None) or m.gradient_checkpointing_enable
                enable({"use_reentrant": False})
            found: dict = {"shape": name, "checkpointing": "yes" if checkpointing else "no"}
            found["plain B/token"] = decoder_bytes(m, input_ids=ids, use_cache=False)
            for backend in ("segments", "dense"):
                found[f"{backend} B/token"] = decoder_bytes(fr.patch(m, backend), **row)
            found["segments / plain"] = found["segments B/token"] / found["plain B/token"]
            rows.append(found)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of a step; twice as many of what is shorter")
    parser.add_argument("--only", choices=["steps", "attention", "rest", "memory"])
    parser.add_argument("--shapes", nargs="*", default=[""], help="only shapes that begin so, such as 8 or 30")
    options = parser.parse_args()
    for name in [name for name in SHAPES if not name.startswith(tuple(options.shapes))]:
        del SHAPES[name]
    repeats = options.repeats
    tables = {
        "attention": ("attention alone, one layer, forward and backward", lambda: attention(2 * repeats)),
        "rest": (
            "the step without attention: a tree row against a plain row of the same S and T",
            lambda: rest(2 * repeats),
        ),
        "memory": ("bytes the decoder keeps for backward", memory),
        "steps": (
            "steps: speed-ups over lean, naive and dense, as ratios of interleaved repeats",
            lambda: steps(repeats),
        ),
    }
    results = {}
    for name, (title, make) in tables.items():
        if options.only in (None, name):
            results[name] = make()
            print_table(title, results[name])
    print_json(benchmark="step", **results)


if __name__ == "__main__":
    main()
