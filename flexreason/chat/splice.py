"""Reasoning put in by hand, where the template does not render that of the message which the model must generate.

Where it goes is seen in what the prompt ends with, and in what the template writes before the message's first text:

    the prompt's end        the lead                what the model must write
    <bot>                   (nothing)               <think>, reasoning, </think>, the message
    <bot><think>            (nothing)               reasoning, </think>, the message
    <bot>                   <think></think>         the same as above: the empty block is filled
    <bot>                   </think>                the same: what closes a block stands there already
    <bot>                   a line break            unknown: it may stand before the reasoning or behind it
    <bot><think>Okay,       (nothing)               unknown: the prompt has begun the reasoning
"""

from flexreason.chat.errors import ALONE, NotAligned
from flexreason.chat.markers import Markers


def splice(
    markers: Markers, asked: str, lead: str, blank: str, body: str, reasoning: str, number: int
) -> tuple[str, int]:
    """What the model must write, and how much of it stands before its response.

    Args:
        asked: What the prompt ends with, from its header on.
        lead: What the template writes behind the prompt and before the message's first text.
        blank: The white space at its beginning, which may belong to the header.
        body: All that it writes behind the prompt, without the reasoning.
    """
    opened = markers.opened_by(asked)
    if opened and not markers.block(asked[asked.rfind(markers.opening) :]):
        raise NotAligned(
            f"the prompt opens the reasoning block with {markers.opening!r} and goes on with "
            f"{asked[asked.rfind(markers.opening) + len(markers.opening) :]!r}, and the chat template does not render "
            f"reasoning behind that; say where reasoning begins with think=(before, behind),{ALONE[1:]}",
            number,
        )
    if markers.closing and markers.closing in lead:
        ends = lead.find(markers.closing)
        begins = lead.find(markers.opening) if markers.around(lead) else ends
        head = markers.rest_of_open(asked) if opened else lead[:begins] + markers.open
        text = f"{head}{reasoning}{markers.close.rstrip()}"
        return text + body[ends + len(markers.closing) :], len(text)
    if blank:
        if markers.origin != "option" or not (markers.open.startswith(blank) or markers.close.endswith(blank)):
            raise NotAligned(
                f"the chat template writes {blank!r} between the prompt and this message, and does not render its "
                "reasoning: whether the reasoning stands before that or behind it is unknown; say so with "
                f"think=(before, behind), of which one has it,{ALONE[1:]}",
                number,
            )
        body = body[len(blank) :]
    text = f"{markers.rest_of_open(asked) if opened else markers.open}{reasoning}{markers.close}"
    return text + body, len(text)
