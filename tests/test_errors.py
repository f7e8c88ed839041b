"""The index of errors holds every message of the package, and each says what to do next."""

import re
from textwrap import dedent

import pytest

import flexreason as fr
from flexreason.chat.messages import check
from flexreason.data.files import read_conversations
from messages import INDEX, Message, all_messages, index, messages_of


def test_the_index_is_the_messages_of_the_code():
    assert INDEX.read_text() == index(all_messages()), "python tests/messages.py writes it anew"


@pytest.mark.parametrize("message", all_messages(), ids=str)
def test_a_message_says_what_to_do_next(message):
    assert message.says_what_to_do, message.text


def test_messages_that_do_not_say_what_to_do_are_noticed():
    for text in ("row: it cannot take rows", "there is a number", "data: nothing is left", "the take of it was wrong"):
        assert not Message(text, "x.py").says_what_to_do, text


def test_messages_are_read_whatever_they_are_made_of():
    source = '''
    OTHER = "; set another one"
    class Bad(ValueError): pass
    def why_it_is_bad() -> str:
        """Why it is bad."""
        return f"it is {1} bad" if x else ""
    def worse(self) -> ValueError:
        return ValueError("expected less of it")
    def f():
        raise ValueError(f"a: expected {n} of "
                         f"them{OTHER}")
        raise Bad("b is bad; " + (f"use {c}" if c else "use d") + "!", 3)
        raise Bad("one of these" if x else "one of those")
        raise worse()
        raise error
        raise KeyboardInterrupt
    '''
    texts = {message.text for message in messages_of(dedent(source), "x.py")}
    assert texts == {
        "it is … bad",
        "expected less of it",
        "a: expected … of them; set another one",
        "b is bad; …!",
        "one of these",
        "one of those",
    }


def test_a_raise_that_cannot_be_read_is_an_error():
    for source in ("raise errors[0]", "raise ValueError('short')", "raise ValueError(texts[0])"):
        with pytest.raises(LookupError):
            list(messages_of(f"def f():\n    {source}", "x.py"))


def test_messages_that_users_meet_are_found_in_the_index(tmp_path):
    """As they are raised, with what was found in the places of the dots."""
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("{}\n")
    met = []
    for attempt in (
        lambda: fr.lay_out([]),
        lambda: fr.collate(3),
        lambda: fr.Rows([], 128),
        lambda: fr.patch(object()),
        lambda: list(read_conversations(wrong)),
        lambda: list(read_conversations(tmp_path / "none.jsonl")),
        lambda: check([{"role": "usr", "content": ""}]),
    ):
        with pytest.raises(ValueError, match=r"\w") as raised:
            attempt()
        met.append(str(raised.value))
    known = [re.compile(".*".join(map(re.escape, message.text.split("…"))), re.DOTALL) for message in all_messages()]
    for words in met:
        assert any(pattern.search(words) for pattern in known), words
