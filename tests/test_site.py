"""The site that `make docs` has built: it fetches nothing from elsewhere, and its own search answers what people ask.

These tests run in the environment of `make docs`, which has no torch; that of `make test` skips them. Search is what
the theme's script does in a browser, said again in Python on the index that it loads: lunr with every word a prefix,
a section's score raised by the share of words found in it, results by page.
"""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("lunr", reason="make docs has it")
from lunr.builder import Builder
from lunr.stop_word_filter import WORDS as STOP_WORDS
from lunr.stop_word_filter import stop_word_filter

SITE = Path(__file__).parents[1] / "build" / "site"
if not SITE.exists():
    pytest.skip("make docs builds the site", allow_module_level=True)

FETCHED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|object|embed)\b[^>]*?(?:src|data)=["']?((?:https?:)?//[^\s"'>]+)"""
    r"""|<link\b(?![^>]*rel=["']?canonical)[^>]*?href=["']?((?:https?:)?//[^\s"'>]+)"""
    r"""|(?:url\(|@import\s+)["']?((?:https?:)?//[^\s"')]+)"""
)
"""What a browser loads without being asked. A link that somebody may follow is no such thing."""

QUESTIONS = {
    # what trackers of other projects are asked most
    "every turn with the history that inference sees": "method.html#every-turn-with-the-history-that-inference-sees",
    "rollout tokens without retokenization": "howto/tools.html#tokens-from-a-rollout-without-rendering-again",
    "shared prefix in GRPO": "howto/rl.html#grpo-several-answers-to-one-question",
    "reward per turn": "howto/rl.html#rewards-and-weights-per-turn",
    "is Qwen3.5 supported?": "models-at-a-glance.html#not-supported-refused",
    "routing replay for mixture of experts": "howto/rl.html#what-is-not-there-routing-replay-for-experts",
    "preserved thinking": "howto/template.html#preserved-thinking-and-other-options-of-the-template",
    "can I train with images?": "models-at-a-glance.html#images-and-sound",
    # what a first reader searched for, and found nothing
    "packing": "comparison.html#one-pass-packing-the-n-samples-the-last-turn-only-reasoning-kept",
    "Does it work with Axolotl?": "howto/trainer.html#axolotl-llama-factory-ms-swift-unsloth",
    "LLaMA-Factory": "howto/trainer.html#axolotl-llama-factory-ms-swift-unsloth",
    "Unsloth": "howto/trainer.html#axolotl-llama-factory-ms-swift-unsloth",
    "prime-rl": "comparison.html#tools-that-share-prefixes",
    "verl": "comparison.html#tools-that-share-prefixes",
    "not worth it": "when-not.html#not-worth-it-five-cases",
    "troubleshooting": "troubleshooting.html",
    # what people need to know before and while they train
    "out of memory": "howto/long.html#out-of-memory",
    "how much memory does an 8B model need?": "memory.html#what-the-model-takes",
    "QLoRA 4-bit": "howto/lora.html#qlora-4-bit-quantized-weights",
    "multi GPU FSDP": "howto/many-gpus.html#fsdp2-sharded-weights",
    "newer transformers version": "newer-transformers.html#after-an-upgrade-of-transformers",
    "which models are supported": "models-at-a-glance.html#supported-exact",
    "resume a killed run": "troubleshooting.html#a-run-was-killed-how-do-i-go-on",
    "loss is nan": "troubleshooting.html#the-loss-is-nan-or-the-run-stops-with-no-number",
    "longer than the context": "howto/long.html#a-conversation-longer-than-a-row-is-split-and-loses-nothing",
    "SFTTrainer": "howto/trainer.html#trls-sfttrainer",
    "data format": "templates.html#files-and-data-formats",
    "vLLM": "tutorial.html#7-use-it-elsewhere-transformers-vllm-gguf",
    "tool calls": "howto/tools.html#what-an-agents-conversation-is",
    "erratum of the paper": "method.html#what-it-costs-and-an-erratum",
    "speed on GPUs": "when-not.html#speed-on-gpus-not-measured-yet",
    "install beside verl": "comparison.html#installed-side-by-side",
    "merge LoRA adapters": "howto/lora.html#lora-by-one-command",
    "model stopped thinking after fine-tuning": "troubleshooting.html#the-model-stopped-thinking-after-fine-tuning",
}
"""What people ask, as they ask it, and the section that answers."""


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="https://a.example/x.js">', True),
        ("<link rel=stylesheet href=//a.example/x.css>", True),
        ('@import "https://a.example/x.css"', True),
        ("src: url(https://a.example/x.woff2)", True),
        ('<a href="https://a.example">', False),
        ('<script src="assets/x.js">', False),
    ],
)
def test_what_is_fetched_is_told_from_what_is_linked_to(page, found):
    assert bool(FETCHED.search(page)) == found


def test_a_page_fetches_nothing_from_elsewhere():
    pages = [*SITE.rglob("*.html"), *SITE.rglob("*.css")]
    assert len(pages) > 20
    assert {path.name: FETCHED.findall(path.read_text()) for path in pages if FETCHED.search(path.read_text())} == {}


LINKED = re.compile(r"""(?:href|src)=["']?(?!\w+:|//)([^\s"'>#?]*)(?:#([^\s"'>]*))?""")
NAMED = re.compile(r"""\b(?:id|name)=["']?([^\s"'>]+)""")


def test_links_of_the_site_lead_somewhere():
    names = {path: set(NAMED.findall(path.read_text())) for path in SITE.rglob("*.html")}
    n, astray = 0, set()
    for path in names.keys() - {SITE / "404.html"}:  # its links begin at the root, wherever it is shown
        for target, part in LINKED.findall(path.read_text()):
            there = (path.parent / unquote(target)).resolve() if target else path
            there = there / "index.html" if there.is_dir() else there
            n += 1
            if not there.exists() or (part and there in names and unquote(part) not in names[there]):
                astray.add((path.name, target, part))
    assert n > 1000
    assert astray == set()


class Search:
    """The search of the site."""

    def __init__(self, said):
        self.separator = re.compile(said["config"]["separator"])
        self.sections = {section["location"]: section for section in said["docs"]}
        assert said["config"]["lang"] == ["en"]
        assert said["config"]["pipeline"] == ["stopWordFilter"]
        builder = Builder()
        builder.ref("location")
        builder.b(0)
        for name in ("title", "text"):
            builder.field(name, boost=said["config"]["fields"][name]["boost"], extractor=self.words_of(name))
        builder.pipeline.add(stop_word_filter)
        for section in self.sections.values():
            builder.add(section)
        self.index = builder.build()

    def words_of(self, name):
        return lambda section: self.words(re.sub(r"<[^>]*>", " ", section[name]))

    def words(self, text):
        return [word for word in self.separator.split(text.lower()) if word]

    def results(self, question):
        """Pages, best first, each with the sections found in it, best first."""
        asked = self.words(question)
        scored = []
        for result in self.index.search(" ".join(f"{word}*" for word in asked)):
            matched = result["match_data"].metadata
            found = {word: any(term.startswith(word) for term in matched) for word in asked}
            found = {word: there for word, there in found.items() if there or word not in STOP_WORDS}
            share = sum(found.values()) / len(found) + ("#" not in result["ref"])
            scored.append((result["score"] * (1 + share**2), result["ref"]))
        pages = {}
        for _, location in sorted(scored, key=lambda one: -one[0]):
            pages.setdefault(location.partition("#")[0], []).append(location)
        return pages


@pytest.fixture(scope="module")
def search():
    return Search(json.loads((SITE / "search" / "search_index.json").read_text()))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_search_answers_within_three_results(question, search):
    answer = QUESTIONS[question]
    assert answer in search.sections, "there is no such section"
    found = search.results(question)
    assert answer.partition("#")[0] in list(found)[:3]
    assert answer in found[answer.partition("#")[0]][:3]


def test_the_search_finds_nothing_where_there_is_nothing(search):
    assert search.results("xylophone zeppelin") == {}
    assert len(QUESTIONS) >= 20
