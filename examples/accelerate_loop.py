"""A loop of your own under accelerate, on any number of processes: every turn of every conversation in one pass.

    python examples/accelerate_loop.py MODEL DATA OUTPUT
    torchrun --nproc-per-node 2 examples/accelerate_loop.py MODEL DATA OUTPUT  # without GPUs: ACCELERATE_USE_CPU=true

MODEL is a name or a folder, DATA a JSONL of {"messages": [...]}, OUTPUT where the trained model goes. Three lines are
not those of any other loop; they are numbered. Accumulation is the loop's own, since what Accelerator divides by with
`gradient_accumulation_steps=K` would come on top.
"""

import json
import os
import sys
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexreason as fr

LENGTH = 4096  # tokens in a row
ROWS_PER_STEP = 4  # over all processes
EPOCHS = 2
LEARNING_RATE = 1e-5


def train(accelerator, model, rows, optimizer):
    """The gradient of an optimizer step is that of the mean over all targets in its rows, on all processes.

    Of a step's `rows.multiple` rows each process takes as many, some of them perhaps empty, and accumulates them.
    """
    model = fr.patch(model, loss="chunked").train()  # 1
    one_row, n = fr.Collator(rows.length), accelerator.num_processes
    if rows.multiple % n:
        raise ValueError(f"a step's {rows.multiple} rows cannot be shared out evenly among {n} processes")
    steps = DataLoader(
        rows, batch_size=rows.multiple // n, collate_fn=lambda items: [one_row([item]) for item in items]
    )
    model, optimizer, steps = accelerator.prepare(model, optimizer, steps)
    losses = []
    for number, step in enumerate(steps):
        total = accelerator.reduce(fr.total_weight(step), "sum")  # 2: of all processes
        mine = 0.0
        for at, row in enumerate(step, 1):
            with nullcontext() if at == len(step) else accelerator.no_sync(model):
                loss = model(**row, num_items_in_batch=total).loss  # 3
                accelerator.backward(loss * n)  # gradients are averaged over processes, and should be summed
            mine = mine + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(mine, "sum").item())
        accelerator.print(f"step {number + 1}/{len(steps)}  loss {losses[-1]:.6f}  targets {int(total)}")
    return losses


def main(name, data, output):
    accelerator = Accelerator()  # mixed_precision="bf16" on GPUs
    if accelerator.num_processes != int(os.environ.get("WORLD_SIZE", 1)):
        sys.exit("each process would train by itself; without a GPU say ACCELERATE_USE_CPU=true before torchrun")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with open(data, encoding="utf-8") as lines:
        encode = fr.EntryEncoder(tokenizer)
        layouts = [encode(json.loads(line)) for line in lines if line.strip()]
    documents = [part for layout in layouts for part in fr.split(layout, LENGTH).parts]  # nothing is cut
    rows = fr.Rows(documents, LENGTH, epochs=EPOCHS, multiple=ROWS_PER_STEP)
    train(accelerator, model, rows, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # DDP trains the model itself; for FSDP see Accelerator.get_state_dict
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
