"""A tokenizer made on the spot: a token a byte, and tokens for who speaks, who has ended and who thinks.

Its template does what those of reasoning models do: earlier answers stand in a prompt without their reasoning.

>>> tokenizer = make()
>>> messages = [
...     {"role": "user", "content": "3+4?"},
...     {"role": "assistant", "reasoning_content": "3+4", "content": "7"},
...     {"role": "user", "content": "times 2?"},
... ]
>>> print(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
<user>3+4?<end><bot>7<end><user>times 2?<end><bot>
"""

from typing import Any

TEMPLATE = """
{%- for message in messages %}
  {%- if message.role == "user" %}
    {{- "<user>" + message.content + "<end>" }}
  {%- elif message.role == "assistant" %}
    {{- "<bot>" }}
    {%- if message.reasoning_content and (loop.last or preserve_thinking) %}
      {{- "<think>" + message.reasoning_content + "</think>" }}
    {%- endif %}
    {{- message.content + "<end>" }}
  {%- else %}
    {{- raise_exception("there are only user and assistant here") }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<bot>" }}{% endif %}"""

END, PAD = "<end>", "<pad>"

SPEAKERS, THINK = ("<user>", "<bot>"), ("<think>", "</think>")


def make() -> Any:
    """A tokenizer of transformers, with its template; `save_pretrained` saves both."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # one for each byte
    bytewise = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    for text in (PAD, END, *SPEAKERS, *THINK):  # thinking is text, and seen where special tokens are left out
        bytewise.add_tokens([AddedToken(text, special=text not in THINK, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token=END, pad_token=PAD, padding_side="left", chat_template=TEMPLATE
    )
