"""Run by several processes at once (torchrun): train and evaluate on data that do not come out even, and tell of which.

python -m torch.distributed.run --nproc-per-node 2 tests/uneven.py '[{"kind": "list", ...}]'
"""

import json
import os
import sys

import torch
from torch.utils.data import Dataset, IterableDataset

import flexreason as fr
from breaking import break_what_is_asked
from flexreason.proof.float64 import true_float64
from models import tiny
from training import LENGTH, leave_together, some_layouts, trainer_arguments


class Map(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, number):
        return self.items[number]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


def table(layouts, streamed=False):
    import datasets

    entries = [{name: tensor.tolist() for name, tensor in vars(layout).items()} for layout in layouts]
    made = datasets.Dataset.from_list(entries)
    return made.to_iterable_dataset(num_shards=2) if streamed else made


KINDS = {
    "list": list,
    "map": Map,
    "table": table,
    "stream": Stream,
    "streamed table": lambda layouts: table(layouts, streamed=True),
    "rows": lambda layouts: [fr.collate([layout], LENGTH) for layout in layouts],
}


class Telling(fr.Collator):
    """A collator that keeps the targets of every row, by which its documents are known."""

    def __init__(self, kind):
        super().__init__(LENGTH)
        self.kind, self.told = kind, []

    def __call__(self, items):
        if "table" in self.kind:  # in true fp64 float32 columns cannot be made
            items = [next(made for made in some_layouts() if made.input_ids.tolist() == i["input_ids"]) for i in items]
        row = items[0] if self.kind == "rows" else super().__call__(items)
        assert self.kind != "rows" or len(items) == 1
        document, ids = row["target_document"][0], row["labels"][0]
        self.told.append([ids[document == n].tolist() for n in range(int(document.max()) + 1)])
        return row


def plain(collator):
    """Rows come from a collator of one's own, which does not know what to make of no items."""
    return (lambda items: collator(items)) if collator.kind == "rows" else collator


def case(name, kind, folder, n, batch, accumulate, **more):
    rank, layouts = int(os.environ["RANK"]), some_layouts()
    model = fr.patch(tiny("Qwen3").double())
    args = trainer_arguments(
        f"{folder}/checkpoints",
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        **more,
    )
    training, evaluation = Telling(kind), Telling(kind)
    asked = {"train_dataset": KINDS[kind](layouts[:n]), "data_collator": plain(training)}
    trainer = fr.RowTrainer(model=model, args=args, eval_dataset=[], **asked)
    with true_float64():
        trainer.train()
        trainer.data_collator = plain(evaluation)
        metrics = trainer.evaluate(KINDS[kind](layouts[:n]))
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    told = {"training": training.told, "evaluation": evaluation.told, "metrics": metrics}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save({"parameters": parameters, "told": told, "losses": losses}, f"{folder}/{name}-{rank}.pt")


if __name__ == "__main__":
    break_what_is_asked()
    for told in json.loads(sys.argv[1]):
        case(**told)
    leave_together()
