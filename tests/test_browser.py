"""Pages in a real browser: what a reader sees lit up is the mask, nothing is loaded, and large pages stay quick.

`make test-browser` runs these; `make test` leaves them out, and says so.
"""

import json
import random
import statistics
from types import SimpleNamespace

import pytest
import torch

import flexreason as fr
from flexreason.show.notes import RefusedScene, Remark, Spoken
from flexreason.show.page import page
from flexreason.show.scene import Scene
from strategies import random_tree, random_turns

WORDS = ("sum", "of", "the", "carry", "one", "answer", "question", "then", "twice", "so")

FRAMES = """async ({selector, by, n}) => {
  const box = selector ? document.querySelector(selector) : document.scrollingElement, times = [];
  let before = await new Promise(requestAnimationFrame);
  for (let at = 0; at < n; at++) {
    box.scrollBy(0, by);
    const now = await new Promise(requestAnimationFrame);
    times.push(now - before);
    before = now;
  }
  return {times, moved: box.scrollTop};
}"""

LIT = """() => {
  const lit = {here: [], sees: [], seen: [], target: [], predictor: []};
  for (const span of document.querySelectorAll("#tree .block span"))
    for (const name in lit) if (span.classList.contains(name)) lit[name].push(Number(span.dataset.i));
  return lit;
}"""


MIDDLE = """(index) => {
  const boxes = document.querySelector(`#tree .block span[data-i="${index}"]`).getClientRects();
  const {left, top, width, height} = boxes[boxes.length - 1];  // it may go over the end of a line
  return [left + width / 2, top + height / 2];
}"""


class Tokenizer:
    """Words for ids; the first few ids are texts of a test's own."""

    def __init__(self, *texts):
        self.texts, self.added_tokens_decoder = texts, {}

    def decode(self, ids, **_):
        return "".join(self.texts[i] if i < len(self.texts) else f" {WORDS[i % len(WORDS)]}{i}" for i in ids)


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens a page of scenes; at the end there was no error, and nothing was asked of a network."""
    problems, contexts = [], []

    def open_page(*scenes, **options):
        path = tmp_path / f"{len(contexts)}.html"
        path.write_text(page(scenes), encoding="utf-8")
        contexts.append(chromium.new_context(**{"viewport": {"width": 1300, "height": 4000}, **options}))
        tab = contexts[-1].new_page()
        tab.on("console", lambda message: problems.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: problems.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
        tab.on("request", lambda asked: problems.append(f"asked: {asked.url}") if asked.url != path.as_uri() else None)
        tab.goto(path.as_uri())
        tab.wait_for_selector("#samples article")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []


TREES = {
    "turns": lambda: fr.lay_out_turns(random_turns([(5, 7, 3), (2, 0, 4), (6, 3, 2)])),
    "any samples": lambda: fr.lay_out(random_tree()),
    "one turn": lambda: fr.lay_out_turns(random_turns([(3, 4, 2)])),
}


@pytest.mark.parametrize("name", TREES)
def test_what_lights_up_is_the_mask(opened, name):
    layout = TREES[name]()
    tab = opened(Scene(layout, Tokenizer()))
    mask = fr.dense_mask(layout)
    tab.wait_for_function(f"document.querySelectorAll('#tree .block span').length === {len(layout)}")
    pairs = []  # (turn, predicting, predicted)
    scene = Scene(layout)
    for number, turn in enumerate(scene.turns):
        path = scene.path(number).tolist()
        pairs += [(number, path[n - 1], path[n]) for n in range(1, len(path)) if turn.trained[n]]
    assert sorted({source for _, source, _ in pairs}) == sorted(set(layout.target_source.tolist()))
    for index in random.Random(0).sample(range(len(layout)), min(25, len(layout))):
        tab.mouse.move(*tab.evaluate(MIDDLE, index))
        lit = tab.evaluate(LIT)
        assert lit["here"] == [index]
        assert lit["sees"] == mask[index].nonzero()[:, 0].tolist()
        assert lit["seen"] == mask[:, index].nonzero()[:, 0].tolist()
        assert set(lit["target"]) == {predicted for _, source, predicted in pairs if source == index}
        assert set(lit["predictor"]) == {source for _, source, predicted in pairs if predicted == index}
        words = tab.inner_text("#inspector")
        assert f"index {index} · position {int(layout.position_ids[index])} · turn {int(layout.turn[index])}" in words
        assert f"sees {int(mask[index].sum())}," in words
        assert f"seen by {int(mask[:, index].sum())}" in words


def test_the_mask_is_drawn_cell_by_cell(opened):
    layout = fr.lay_out(random_tree())
    n = len(layout)
    tab = opened(Scene(layout, Tokenizer()))
    tab.click("[data-view=mask]")
    grey = """() => {
      const c = document.getElementById("cells"), d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
      return {size: c.width, at: Array.from({length: c.width * c.width}, (_, i) => d[4*i] + d[4*i+1] + d[4*i+2])};
    }"""
    found = tab.evaluate(grey)
    size, values = found["size"], found["at"]
    drawn = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for kv in range(n):
            x, y = int((kv + 0.5) * size / n), int((q + 0.5) * size / n)
            drawn[q, kv] = values[y * size + x] < 700
    assert torch.equal(drawn, fr.dense_mask(layout))
    box = tab.query_selector("#cells").bounding_box()
    for q, kv in random.Random(1).sample([(q, kv) for q in range(n) for kv in range(n)], 30):
        tab.mouse.move(box["x"] + (kv + 0.5) * box["width"] / n, box["y"] + (q + 0.5) * box["height"] / n)
        assert (" sees " in tab.inner_text("#cell")) == bool(fr.dense_mask(layout)[q, kv]), (q, kv)


def test_a_large_mask_is_drawn_from_its_blocks(opened):
    layout = fr.lay_out_turns(random_turns([(200, 500, 130)] * 5))
    tab = opened(Scene(layout, Tokenizer()))
    tab.click("[data-view=mask]")
    given = tab.evaluate("tokens.blocks.rows")
    blocks = fr.block_mask(layout)
    side = 128
    mask = fr.dense_mask(layout)
    assert len(given) == blocks.kv_num_blocks.shape[-1] == -(-len(layout) // side)
    for q, row in enumerate(given):
        kinds = {kv: kind for first, last, kind in row for kv in range(first, last + 1)}
        for kv in range(len(given)):
            block = mask[q * side : (q + 1) * side, kv * side : (kv + 1) * side]
            assert kinds.get(kv) == (
                1 if bool(block.all()) and block.shape == (side, side) else 0 if bool(block.any()) else None
            )


def test_texts_are_shown_as_text(opened):
    texts = (
        "<script>alert(1)</script>",
        "\"'&amp;",
        "🙂👩‍👧",
        " مرحبا بالعالم",
        "\x1b[2J\x00",
        "\u202eabc",
        "</script>",
        "{data}",
        "\ud800",
    )
    layout = fr.lay_out_turns([(list(range(len(texts))), [], [20])])
    tab = opened(Scene(layout, Tokenizer(*texts), "<b>where</b> & {script}", remarks=[Remark("<i>look</i>", 0)]))
    shown = tab.inner_text("#samples")
    for text in (*texts[:4], "⟨U+001B⟩[2J⟨U+0000⟩", "⟨U+202E⟩abc", "</script>", "{data}", "⟨U+D800⟩", "<i>look</i>"):
        assert text.strip() in shown, text
    assert "<b>where</b> & {script}" in tab.inner_text("#about")


def test_keys_walk_along_a_sample(opened):
    layout = fr.lay_out_turns(random_turns([(4, 3, 2), (3, 2, 2), (2, 2, 2)]))
    scene = Scene(layout, Tokenizer())
    tab = opened(scene)
    looked_at = "here"
    tab.keyboard.press("ArrowDown")
    path = scene.path(0).tolist()
    assert tab.evaluate(looked_at) == path[4]  # the first that is trained
    for n in (5, 6):
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate(looked_at) == path[n]
    tab.keyboard.press("ArrowDown")
    path = scene.path(1).tolist()
    n = scene.turns[1].n_prompt
    assert tab.evaluate(looked_at) == path[n]
    for _ in range(n + 3):  # through what is shared, which opens, to the first token, and no further
        tab.keyboard.press("ArrowLeft")
    assert tab.evaluate(looked_at) == path[0]
    assert tab.is_visible("#turn-1 .here")
    tab.keyboard.press("Escape")
    assert tab.evaluate(looked_at) == -1
    assert tab.query_selector(".sees") is None


def test_a_phone_shows_one_view_at_a_time(opened):
    scene = Scene(fr.lay_out_turns(random_turns([(40, 30, 20), (30, 20, 20)])), Tokenizer(), "chats.jsonl, line 1")
    tab = opened(scene, viewport={"width": 375, "height": 800}, has_touch=True, is_mobile=True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    tab.tap("#turn-0 .trained .block span >> nth=3")
    assert tab.evaluate("here") == int(scene.path(0)[scene.turns[0].n_prompt + 3])
    assert "sees" in tab.inner_text("#inspector")
    for view in ("tree", "mask", "ways", "samples"):
        tab.tap(f"[data-view={view}]")
        assert [name for name in ("samples", "tree", "mask", "ways") if tab.is_visible(f"#{name}")] == [view]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 375


def luminance(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(opened, scheme):
    tab = opened(Scene(fr.lay_out_turns(random_turns([(4, 3, 2)])), Tokenizer()), color_scheme=scheme)
    names = (
        "card",
        "prompt",
        "reasoning",
        "response",
        "ink",
        "soft",
        "alarm",
        "sees",
        "seen",
        "alarm-fill",
        "reasoning-fill",
        "response-fill",
    )
    found = tab.evaluate(f"Object.fromEntries({json.dumps(names)}.map((name) => [name, colour(name)]))")
    light = SimpleNamespace(**{name.replace("-", "_"): luminance(value) for name, value in found.items()})
    assert (light.card > 0.5) == (scheme == "light")

    def contrast(a, b):
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    for text in (light.prompt, light.reasoning, light.response, light.ink, light.soft, light.alarm):
        assert contrast(text, light.card) >= 4.5
    assert contrast(light.reasoning, light.reasoning_fill) >= 4.5
    assert contrast(light.response, light.response_fill) >= 4.5
    assert contrast(light.alarm, light.alarm_fill) >= 4.5
    for fill in (light.sees, light.seen):
        for text in (light.ink, light.reasoning, light.response):
            assert contrast(text, fill) >= 3
    tab.click("#theme")
    assert (luminance(tab.evaluate("colour('card')")) > 0.5) == (scheme == "dark")


def test_what_is_to_be_looked_at_is_a_click_away(opened):
    refused = RefusedScene(
        "chats.jsonl, line 2", "unclosed-reasoning", "its content begins with <think>",
        [Spoken(0, "user", "2+3?"), Spoken(1, "assistant", "<think>so")], 1,
    )  # fmt: skip
    untrained = Spoken(3, "assistant", "an answer that is left out", "this answer is not trained: train: false")
    layout = fr.lay_out_turns(random_turns([(40, 30, 20)] * 4))
    remarks = [
        Remark("its reasoning is followed by no answer: is it cut off?", 2, 7),
        Remark(untrained.words, message=3),
    ]
    first = Scene(layout, Tokenizer(), "chats.jsonl, line 1", [1, 5, 7, 9], remarks, [untrained])
    tab = opened(first, refused, viewport={"width": 1200, "height": 700})
    named = ["chats.jsonl, line 1, message 7 (turn 2)", "chats.jsonl, line 1, message 3"]
    assert tab.locator("#remarks .at").all_inner_texts() == [*named, "chats.jsonl, line 2, message 1"]
    tab.set_viewport_size({"width": 390, "height": 844})
    box = tab.locator("#remarks")
    assert box.evaluate("it => it.scrollHeight <= it.clientHeight + 1"), "all three are seen on a phone"
    tab.set_viewport_size({"width": 1200, "height": 700})
    tab.click("#remarks button >> text=no answer")
    assert tab.locator("#turn-2").bounding_box()["y"] < 500
    assert "no answer" in tab.inner_text("#turn-2 .warning")
    tab.click("#remarks button >> text=train: false")
    assert "left out" in tab.inner_text("#message-3")
    assert tab.locator("#message-3").bounding_box()["y"] < 500
    order = tab.evaluate("[...document.querySelectorAll('#samples article')].map((card) => card.id)")
    assert order == ["turn-0", "message-3", "turn-1", "turn-2", "turn-3"]
    tab.click("#remarks button >> text=refused")
    assert "refused" in tab.inner_text("#about")
    assert "unclosed-reasoning: its content begins with <think>" in tab.inner_text("#samples .warning")
    assert "<think>so" in tab.inner_text("#samples .blamed")


def test_other_ways_are_held_against_what_inference_sends(opened):
    turns = [(10, 20, 5), (6, 30, 7), (8, 12, 9)]
    tab = opened(Scene(fr.lay_out_turns(random_turns(turns)), Tokenizer()))
    tab.click("[data-view=ways]")
    tab.click(".map button >> nth=2")
    words = tab.inner_text("#ways")
    sent, targets = 10 + 5 + 6 + 7 + 8, [h for _, t, r in turns for h in [t + r]]
    assert f"{sent} tokens sent, {targets[2]} to be generated" in words
    assert f"{20 + 30} tokens of earlier reasoning stand before the answer, which inference never sends" in words
    assert f"{targets[2]} of {sum(targets)} targets are trained; {sum(targets[:2])} are lost" in words


def test_a_page_of_a_hundred_thousand_tokens_is_quick(opened, tmp_path):
    turns = random_turns([(300, 500, 200)] * 100, vocabulary=900)
    layout = fr.lay_out_turns(turns)
    assert len(layout) >= 100_000
    tab = opened(Scene(layout, Tokenizer()), viewport={"width": 1300, "height": 900})
    taken = tab.evaluate("""async () => {
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      return performance.now();
    }""")
    frames = tab.evaluate(FRAMES, {"selector": None, "by": 700, "n": 120})
    beside = tab.evaluate(FRAMES, {"selector": "#tree", "by": 500, "n": 60})
    times = frames["times"] + beside["times"]
    print(f"opened in {taken:.0f} ms; frames: median {statistics.median(times):.0f} ms, longest {max(times):.0f} ms")
    assert frames["moved"] > 50_000
    assert beside["moved"] > 10_000
    assert taken < 2000
    assert statistics.median(times) <= 100
    assert max(times) <= 300
    tab.hover("#samples .block span >> visible=true >> nth=0")
    assert tab.evaluate("here") >= 0
