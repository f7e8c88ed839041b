"""Conversations made to mislead: texts that look like tags, like reasoning, like each other."""

from templating import call, in_both_fields, result, stops, trl_tokenizer, user

PIECES = [
    '', ' ', '\n', '\n\n', '<think>', '</think>', '<think>\n', '\n</think>\n\n', '<|im_end|>',
    '<|im_start|>assistant\n', '<|im_end|>\n', '<|end|>', '<|eot|>', '</s>', '<tool_call>', '</tool_call>',
    '<|user|>', '<end_of_turn>', 'yes', 'no', 'the answer is 12', 'assistant', '{{ messages }}', '{% raw %}',
    '🙂', '漢字', 'é', 'e\u0301', '\xa0', '\t', "'s", '"', '\\', '{"a": 1}', "a" * 300, 'zQ7xVkKmark', '1',
    ' 2 ', '.', '[INST]', '<bos>', 'music', 'linux', 'her', 'be',
]  # fmt: skip


def text(draw, least=0):
    """A few pieces; now and then none."""
    return "".join(draw.choices(PIECES, k=draw.choice([least, 1, 1, 2, 3, 5])))


def conversation(draw, tools=False):
    """Messages, of which any text may be anything."""
    messages = [{"role": "system", "content": text(draw, 1)}] if draw.random() < 0.2 else []
    seen, number = ["yes"], 0
    for _ in range(draw.randint(1, 4)):
        messages.append(user(text(draw, 1)))
        if tools and draw.random() < 0.6:
            for _ in range(draw.randint(1, 2)):
                number += 1
                made = call(number, text(draw, 1), text(draw) if draw.random() < 0.6 else None)
                messages += [made, result(number, text(draw, 1))]
        content = draw.choice(seen) if draw.random() < 0.2 else text(draw)
        seen.append(content)
        message = {"role": "assistant", "content": content}
        if draw.random() < 0.6:
            message["reasoning_content"] = draw.choice(seen) if draw.random() < 0.3 else text(draw)
        elif draw.random() < 0.3:
            message["content"] = f"<think>\n{text(draw)}\n</think>\n\n{content}"
        messages.append(message)
    return messages


def fault(name, encoder, messages, found, tools):
    """What is wrong with the samples found, by means that know nothing of marks; None if nothing is."""
    tokenizer = trl_tokenizer(name)
    for turn, sample, i in zip(found.texts, found.samples, found.messages, strict=True):
        before, message = in_both_fields(messages[:i]), messages[i]
        asked = {"tools": tools, "add_generation_prompt": True}
        # reasoning that stands in contents; its opening tag is missing where a prompt has written that
        prompts = turn.prompt, encoder.template(tools).prompt_end
        tag = "think>" if any(text.rstrip().endswith("<think>") for text in prompts) else "<think>"
        inline = any(tag in str(m["content"]) for m in [*before, message] if m["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(before, tokenize=False, **asked)
        if inline and prompt != turn.prompt:
            continue  # taken out of a history that would show it
        ids = tokenizer.apply_chat_template(before, return_dict=False, **asked)
        if ids != list(sample.prompt_ids) or prompt != turn.prompt:
            return f"{i}: another prompt"
        if tokenizer.decode([*sample.prompt_ids, *sample.target_ids]) != prompt + turn.target:
            return f"{i}: does not decode to prompt and target"
        both = tokenizer(prompt + turn.target, add_special_tokens=False)["input_ids"]
        if both[: len(ids)] == ids and both[len(ids) :] != list(sample.target_ids):
            return f"{i}: the target is not the rest"
        whole = tokenizer.apply_chat_template([*before, *in_both_fields([message])], tools=tools, tokenize=False)
        own = message["content"].lstrip().startswith("<think>") or (tag == "think>" and tag in message["content"])
        block = message["content"].lstrip().removeprefix("<think>").partition("</think>")[0].strip()
        own = own and message.get("reasoning_content", "").strip() in ("", block)  # what both say is said once
        plain = turn.how == "rendered" and not own and whole.startswith(prompt)
        calls = bool(message.get("tool_calls"))
        if plain and (wrong := _compare(name, whole[len(prompt) :], turn.target, calls)):
            return f"{i}: {wrong}"
        reasoning = message.get("reasoning_content", "").strip()
        if turn.how != "thinking off" and reasoning and reasoning not in turn.target:
            return f"{i}: no reasoning in {turn.target!r}"
        tagged = "<think>" in message["content"] or "</think>" in message["content"]
        if not tagged and message["content"].strip() not in turn.target:
            return f"{i}: no content in {turn.target!r}"
    return None


def tokenizer_eos(name):
    return trl_tokenizer(name).eos_token


def _compare(name, rest, target, calls):
    """The target is the rendering behind the prompt, to the stop token that stands in its last few characters."""
    stop = stops(name)[1 if calls else 0]
    if rest.startswith(target):
        behind = rest[len(target) :]
        if not target.endswith(stop):
            return f"{target!r} does not end with {stop}"
        return f"{behind!r} stands behind {target!r}" if behind.strip() not in ("", tokenizer_eos(name)) else None
    bare = target.removesuffix(stop)
    return None if rest.rstrip() == bare.rstrip() else f"expected {rest!r}, found {target!r}"
