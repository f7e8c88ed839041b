"""Training by hand: the definition that every trainer is held against. Also what runs of the command start from."""

import json
import os
import random
import socket
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, TrainingArguments

import flexreason as fr
from flexreason.load import stand_in
from flexreason.proof.float64 import relative_l2
from models import TINY
from strategies import random_turns

LENGTH = 512
LEARNING_RATE = 0.05

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<bot>"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}</bot>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def some_turns(n=21, seed=5):
    """Conversations [(h, t, r), ...] of one to five turns, some without reasoning, of very different lengths."""
    draw = random.Random(seed)
    shapes = [
        [
            (draw.randint(3, 20), draw.choice([0, draw.randint(1, 60)]), draw.randint(1, 30))
            for _ in range(draw.randint(1, 5))
        ]
        for _ in range(n)
    ]
    return [random_turns(shape, seed=seed) for seed, shape in enumerate(shapes)]


def some_layouts(n=21, seed=5):
    return [fr.lay_out_turns(turns) for turns in some_turns(n, seed)]


def steps_of(rows, layouts):
    """The layouts of each optimizer step."""
    numbers = [rows.documents(row) for row in range(len(rows))]
    n = rows.multiple
    return [[layouts[k] for row in numbers[at : at + n] for k in row] for at in range(0, len(numbers), n)]


def fit_by_hand(model, steps, weighting="token"):
    """A step of SGD a list of layouts, on their samples one by one; the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], LEARNING_RATE)
    losses = []
    for layouts in steps:
        samples = [sample for layout in layouts for sample in fr.unmerge(layout)]
        weights = [1 / len(sample.target_ids) if weighting == "turn" else 1.0 for sample in samples]
        total = sum(w * len(sample.target_ids) for w, sample in zip(weights, samples, strict=True))
        losses.append(0.0)
        for w, sample in zip(weights, samples, strict=True):
            n = len(sample.prompt_ids)
            ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
            logits = model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]
            loss = w * torch.nn.functional.cross_entropy(logits, ids[0, n:], reduction="sum") / total
            loss.backward()
            losses[-1] += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def trainer_arguments(folder, kind=TrainingArguments, **more):
    """Of a Trainer that does as the loop does: plain SGD, nothing clipped, nothing saved, on the CPU."""
    given = {
        "output_dir": str(folder),
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
    }
    return kind(**{**given, **more})


def way_gone(found, wanted, start):
    """The largest relative error of any parameter's way from its start."""
    assert found.keys() == wanted.keys() == start.keys()
    for name, before in start.items():
        assert not torch.equal(wanted[name], before), name
    return max(relative_l2([found[name] - start[name]], [wanted[name] - start[name]]) for name in start)


class CollatorAsEver(fr.Collator):
    """A row is made outside of true fp64, which would make float64 of the float32 that a column holds."""

    def __call__(self, batch):
        with torch._C.DisableTorchFunction():
            return super().__call__(batch)


def write_model(folder, **sizes):
    """A tokenizer and a config, for a model with random weights, tiny but for the sizes that are given."""
    tokenizer = stand_in(TEMPLATE)
    tokenizer.save_pretrained(str(folder))
    Qwen3Config(**{**TINY, "vocab_size": len(tokenizer), **sizes}).save_pretrained(str(folder))
    return folder


def write_data(path, n=60, seed=0, turns=5):
    """Sums that go on from each other."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(n):
            messages, total = [], draw.randint(1, 9)
            for turn in range(draw.randint(1, turns)):
                more = draw.randint(1, 9)
                question = f"{total}+{more}?" if turn == 0 else f"plus {more}?"
                messages.append({"role": "user", "content": question})
                thought, total = f"{total}+{more} is {total + more}", total + more
                messages.append({"role": "assistant", "reasoning_content": thought, "content": str(total)})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def randomized(model):
    """What trains of a model, its adapters, with random weights: with B = 0 every gradient of A would be 0 at first."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=draw) * 0.1)
    return model


def free_port():
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return opened.getsockname()[1]


def leave_together():
    """End this process, one of several, when all have written what they have to write, and leave Python's end out.

    On CPUs it is not safe: with torch's sharding about one run in five was aborted while Python went down, and without
    it a run now and then, after all its results were written.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


def environment():
    """For processes of their own: the same package as here, the tests' modules beside it, one thread."""
    here = [str(Path(fr.__file__).parents[1]), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(here), "OMP_NUM_THREADS": "1"}
