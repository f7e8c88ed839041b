"""Targets are what a model must write that has been sent the prompt: over templates made at random."""

from random import Random

import pytest

from flexreason.chat.encode import Encoder
from flexreason.chat.errors import NotAligned
from inference import Inference, draw, tokenizer_of
from templating import TOOLS, answer, call, result, user

CONVERSATIONS = [
    [user("harbour"), answer("granite", "quartz"), user("lantern"), answer("meadow", "timber")],
    [user("harbour"), answer("granite"), user("lantern"), answer("meadow", "timber"), user("pebble"), answer("willow")],
    [{"role": "system", "content": "willow"}, user("harbour"), answer("granite"), user("lantern"), answer("meadow")],
    [
        user("harbour"),
        call(1, "granite", "quartz"),
        result(1, "lantern"),
        call(2, "meadow"),
        result(2, "orchard"),
        answer("pebble", "walnut"),
    ],
]


def faults(numbers):
    """Over the templates of these numbers: turns that came out right; those refused though one can know, those refused
    that nobody can know, and those that came out wrong though one can know."""
    right, refused, unknown, wrong = [], [], [], []
    for number in numbers:
        choices = draw(Random(number))
        encoder, inference = Encoder(tokenizer_of(choices)), Inference(choices)
        for messages in CONVERSATIONS:
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            for turn, i in enumerate(answers):
                try:
                    found = encoder.encoded(messages[: i + 1], TOOLS if choices.named else None, turns=[turn]).texts[0]
                except NotAligned as error:
                    (unknown if choices.unknowable else refused).append((number, str(error)))
                    continue
                sent, written = inference.prompt(messages[:i]), inference.target(messages[i])
                assert found.prompt == sent, number
                if found.target == written:
                    right.append(number)
                elif not choices.unknowable:
                    wrong.append((number, sent[-60:], found.target, written))
    return right, refused, unknown, wrong


def test_targets_are_what_a_model_must_write_behind_the_prompt():
    right, refused, unknown, wrong = faults(range(150))
    assert wrong == []
    assert refused == []
    assert len(right) > 1000
    assert len(unknown) > 50


@pytest.mark.slow
def test_targets_of_very_many_templates_are_what_a_model_must_write():
    right, refused, unknown, wrong = faults(range(10_000, 20_000))
    assert wrong == []
    assert refused == []
    assert len(right) > 70_000
    assert len(unknown) > 3_000


def test_the_templates_made_are_of_every_kind():
    """Each choice is made both ways, and most templates differ between prompt and answer."""
    made = [draw(Random(number)) for number in range(150)]
    for name in ("suffix", "tools", "reminder", "attribute", "no_break", "opens", "special", "begins"):
        assert 10 < sum(bool(getattr(choices, name)) for choices in made) < 140, name
    for name in ("kind", "reasoning", "eos", "prompt_role", "block"):
        assert len({getattr(choices, name) for choices in made}) > 1, name
    assert sum(choices.differs for choices in made) > 100
    assert 20 < sum(bool(choices.unknowable) for choices in made) < 60


def test_what_is_unknowable_is_refused_where_the_role_is_another():
    """The prompt says `model`, and no message begins so."""
    for number in range(400):
        choices = draw(Random(number))
        if choices.prompt_role != "assistant" and not choices.differs:
            with pytest.raises(NotAligned, match="neither goes on from the other"):
                Encoder(tokenizer_of(choices)).encoded(CONVERSATIONS[0], TOOLS)
