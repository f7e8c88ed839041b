"""transformers' Trainer: every turn of every conversation in one pass.

    python examples/trainer.py MODEL DATA OUTPUT
    torchrun --nproc-per-node 2 examples/trainer.py MODEL DATA OUTPUT

MODEL is a name or a folder, DATA a JSONL of {"messages": [...]}, OUTPUT where the trained model goes. Three lines are
not those of any other Trainer; they are numbered.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import flexreason as fr

LENGTH = 4096  # tokens in a row
EPOCHS = 2
ARGUMENTS = {
    "num_train_epochs": 1,  # `Rows` holds all epochs, each in an order of its own
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-5,
    "weight_decay": 0.0,
    "bf16": torch.cuda.is_available(),
    "logging_steps": 1,
    "report_to": "none",
}


def train(model, documents, output, tokenizer=None, epochs=EPOCHS, **more):
    """The gradient of an optimizer step is that of the mean over all targets in its rows, on all processes."""
    args = TrainingArguments(output_dir=output, **{**ARGUMENTS, **more})
    rows_per_step = args.gradient_accumulation_steps * args.world_size
    trainer = fr.RowTrainer(
        model=fr.patch(model, loss="chunked"),  # 1
        args=args,
        train_dataset=fr.Rows(documents, LENGTH, epochs=epochs, multiple=rows_per_step),  # 2
        data_collator=fr.Collator(LENGTH),  # 3
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer


def main(name, data, output):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with open(data, encoding="utf-8") as lines:
        encode = fr.EntryEncoder(tokenizer)
        layouts = [encode(json.loads(line)) for line in lines if line.strip()]
    documents = [part for layout in layouts for part in fr.split(layout, LENGTH).parts]  # nothing is cut
    train(model, documents, output, tokenizer).save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
