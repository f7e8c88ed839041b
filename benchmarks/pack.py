"""Packing: documents a second, memory of a stream, and how full rows are beside the best that knows all documents.

    python benchmarks/pack.py
    python benchmarks/pack.py --data FILES --tokenizer FOLDER    # lengths of your own conversations' trees

Without data, lengths are drawn from a lognormal fit of real trees (maths follow-ups, tool loops, agents); what would
be longer than a row is drawn again. With data, every conversation is encoded and, where its tree is longer than a row,
split; what a split computes twice is stored, but is not counted as fill. Files are mixed and repeated, each time in
another order, until there are enough rows. *FFD* is first-fit-decreasing over all documents at once, which no stream
can have. The last row is left out where that is said.
"""

import argparse
import math
import random
import statistics
import time
from array import array

import flexreason as fr
from flexreason.data.pack import Packer
from measure import interleaved, peak_mib, print_json, print_table

MEAN, SPREAD = 6.8, 0.93
"""Of the logarithm of tree lengths, with Qwen3's tokenizer and template."""


def drawn(n, longest, seed=0):
    """Lengths as trees have them, one after the other."""
    draw = random.Random(seed)
    for _ in range(n):
        while (size := 1 + int(draw.lognormvariate(MEAN, SPREAD))) > longest:
            pass
        yield size


def first_fit_decreasing(sizes, length):
    """How many rows; a tree of the largest room below each node finds the first row that fits."""
    width = 1
    while width < len(sizes):
        width *= 2
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


def slow_first_fit_decreasing(sizes, length):
    rooms = []
    for size in sorted(sizes, reverse=True):
        at = next((k for k, room in enumerate(rooms) if size <= room), None)
        if at is None:
            rooms.append(length - size)
        else:
            rooms[at] -= size
    return len(rooms)


def fullness(sizes, length, useful=None):
    """Rows of a stream of these sizes, and how full; `useful` are tokens that are counted as fill."""
    useful = useful or sizes
    rows = list(Packer(length).pack(enumerate(sizes)))
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    assert all(sum(sizes[number] for number in row) <= length for row in rows)
    stored = [sum(sizes[number] for number in row) / length for row in rows]
    filled = [sum(useful[number] for number in row) / length for row in rows]
    best = sum(stored) / first_fit_decreasing(sizes, length)
    return {
        "row": length,
        "documents": len(sizes),
        "rows": len(rows),
        "fill, last aside": statistics.fmean(filled[:-1] or filled),
        "stored, last aside": statistics.fmean(stored[:-1] or stored),
        "stored": statistics.fmean(stored),
        "stored by FFD": best,
        "less FFD": statistics.fmean(stored) - best,
    }


def speed(n, length, repeats):
    sizes = array("q", drawn(n, length))

    def run():
        for _ in Packer(length).pack(enumerate(sizes)):
            pass

    seconds = statistics.median(interleaved({"": run}, repeats)[""])
    return {"row": length, "documents": n, "s": seconds, "documents / s": int(n / seconds)}


def memory(n, length):
    """A stream whose lengths nobody keeps, and whose rows nobody keeps."""

    def run():
        for _ in Packer(length).pack(enumerate(drawn(n, length))):
            pass

    return {"row": length, "documents": n, "peak MiB": peak_mib(run)}


def encoded(files, tokenizer):
    """The layouts of all conversations, and how many were refused."""
    from transformers import AutoTokenizer

    from flexreason.chat.encode import Encoder
    from flexreason.chat.render import ConversationError
    from flexreason.data.files import read_conversations

    encoder = Encoder(AutoTokenizer.from_pretrained(tokenizer))
    layouts, refused = [], 0
    for file in files:
        for found in read_conversations(file):
            try:
                layouts.append(encoder.layout(found.messages, found.tools))
            except ConversationError:
                refused += 1
    return layouts, refused


def real(layouts, length, least_rows, seed=0):
    """All conversations again and again, in another order each time."""
    conversations, dropped, longer = [], 0, 0
    for layout in layouts:
        found = fr.split(layout, length, too_long="drop")
        longer += len(found.parts) > 1
        dropped += len(found.dropped)
        sizes = [len(part) for part in found.parts]
        twice = found.recomputed  # taken from the last parts: which of them does not matter to a sum over rows
        useful = []
        for size in reversed(sizes):
            taken = min(twice, size)
            twice -= taken
            useful.append(size - taken)
        conversations.append((sizes, useful[::-1]))
    draw, sizes, useful = random.Random(seed), [], []
    while sum(sizes) < (least_rows + 1) * length:
        draw.shuffle(conversations)
        for some_sizes, some_useful in conversations:
            sizes += some_sizes
            useful += some_useful
    return {"split": longer, "samples dropped": dropped, **fullness(sizes, length, useful)}


def fit(layouts):
    logs = [math.log(len(layout)) for layout in layouts]
    return statistics.fmean(logs), statistics.stdev(logs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", metavar="FILE")
    parser.add_argument("--tokenizer", help="folder or name; needed with --data")
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--rows", type=int, default=200, help="of data, at least so many")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if bool(options.data) != bool(options.tokenizer):
        parser.error("--data and --tokenizer go together")
    some = list(drawn(3000, 4096))
    assert first_fit_decreasing(some, 4096) == slow_first_fit_decreasing(some, 4096)
    results = {}
    if options.data:
        start = time.perf_counter()
        layouts, refused = encoded(options.data, options.tokenizer)
        mean, spread = fit(layouts)
        print(
            f"{len(layouts)} conversations from {len(options.data)} files ({refused} refused) encoded in "
            f"{time.perf_counter() - start:.1f} s; logarithm of tree lengths: mean {mean:.2f}, deviation {spread:.2f}; "
            f"longest {max(map(len, layouts))}"
        )
        results["data"] = [real(layouts, length, options.rows) for length in options.lengths]
        print_table("rows of real conversations", results["data"])
    else:
        results["speed"] = [speed(options.documents, length, options.repeats) for length in options.lengths]
        print_table("speed", results["speed"])
        results["memory"] = [memory(n, options.lengths[-1]) for n in (options.documents // 10, options.documents)]
        print_table("memory of a stream", results["memory"])
        results["fullness"] = [fullness(list(drawn(options.documents, length)), length) for length in options.lengths]
        print_table("how full rows are", results["fullness"])
    print_json(benchmark="pack", **results)


if __name__ == "__main__":
    main()
