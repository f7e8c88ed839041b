"""trl's SFTTrainer with LoRA: every turn of every conversation in one pass, several conversations a row.

    python examples/sft.py MODEL DATA OUTPUT
    torchrun --nproc-per-node 2 examples/sft.py MODEL DATA OUTPUT

MODEL is a name or a folder, DATA a JSONL of {"messages": [...]}, OUTPUT where the adapters go. One line is not that of
any other SFTTrainer; it is numbered.
"""

import sys

import datasets
import torch
from peft import LoraConfig
from trl import SFTConfig

import flexreason as fr

ARGUMENTS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,  # conversations in a row
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "bf16": torch.cuda.is_available(),
    "logging_steps": 1,
    "report_to": "none",
}
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def train(model, dataset, output, tokenizer=None, peft_config=LORA, **more):
    """The gradient of an optimizer step is that of the mean over all targets in its rows, on all processes."""
    trainer = fr.RowSFTTrainer(  # 1
        model=model,
        args=SFTConfig(output_dir=output, **{**ARGUMENTS, **more}),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def main(name, data, output):
    dataset = datasets.load_dataset("json", data_files=data, split="train")
    train(name, dataset, output).save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
