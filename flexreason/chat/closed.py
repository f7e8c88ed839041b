"""What the model must write behind a prompt that has closed the block of reasoning, since thinking is off.

The rendering of the message may close such a block too, in whatever form, or have none:

    the prompt's end               the rendering                 what the model must write
    <bot><think></think>           <bot>the message              the message
    <bot></think>                  <bot>the message              the message
    <bot><think></think>           <bot></think>the message      the message: both close the block
    <bot></think><answer>          <bot><answer>the message      the message: both begin the answer
    <bot></think><answer>          <bot>the message              unknown: the prompt has begun something else
"""

from flexreason.chat.before import Before
from flexreason.chat.marks import Marked
from flexreason.chat.seam import says_something


def behind_closed_block(before: Before, known: str, asked: str, lead: str, marked: Marked, body: str) -> str:
    """The rest of a message's rendering: without the header, the closed block, and what else the prompt holds already.

    Args:
        known: What follows the last user's text in the prompt.
        asked: The part of `known` that the template writes only for generation. The closed block is in it.
        lead: What follows the user's text in the rendering of the marked message, up to the first mark.
        body: `lead` and the message itself, up to its stop token.
    """
    template, closing = before.template, before.template.markers.closing
    header = len(known) - len(asked) + template.markers.begin_of_closed(asked)
    behind = asked.rpartition(closing)[2]
    seam = before.seam(known[:header], lead, marked, plain=True, block=known[header:])
    own = lead.rfind(closing, seam.end)
    rest = body[seam.end if own < 0 else own + len(closing) :]
    behind = behind.lstrip() if own < 0 else behind
    shared = template.shared(behind, rest)
    if says_something(behind[len(shared) :], template.added):
        raise before.no_seam(known, lead)
    return rest[len(shared) :]
