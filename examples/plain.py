"""Plain PyTorch: every turn of every conversation in one pass.

    python examples/plain.py MODEL DATA OUTPUT

MODEL is a name or a folder, DATA a JSONL of {"messages": [...]}, OUTPUT where the trained model goes. Three lines are
not those of any other loop; they are numbered.
"""

import json
import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexreason as fr

LENGTH = 4096  # tokens in a row
ROWS_PER_STEP = 4
EPOCHS = 2
LEARNING_RATE = 1e-5


def train(model, rows, optimizer):
    """The gradient of an optimizer step is that of the mean over all targets in its `rows.multiple` rows."""
    model = fr.patch(model, loss="chunked").train()  # 1
    one_row = fr.Collator(rows.length)
    steps = DataLoader(rows, batch_size=rows.multiple, collate_fn=lambda items: [one_row([item]) for item in items])
    device, losses = model.device, []
    for number, step in enumerate(steps):
        total = fr.total_weight(step)  # 2
        losses.append(0.0)
        for row in step:
            row = {name: tensor.to(device) for name, tensor in row.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = model(**row, num_items_in_batch=total).loss  # 3
            loss.backward()
            losses[-1] += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {number + 1}/{len(steps)}  loss {losses[-1]:.6f}  targets {int(total)}")
    return losses


def main(name, data, output):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    with open(data, encoding="utf-8") as lines:
        encode = fr.EntryEncoder(tokenizer)
        layouts = [encode(json.loads(line)) for line in lines if line.strip()]
    documents = [part for layout in layouts for part in fr.split(layout, LENGTH).parts]  # nothing is cut
    rows = fr.Rows(documents, LENGTH, epochs=EPOCHS, multiple=ROWS_PER_STEP)
    train(model, rows, torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0))
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
