"""trl's SFTTrainer with LoRA: every turn of every conversation in one pass, several conversations a row.

    python examples/sft.py MODEL DATA OUTPUT

MODEL is a name or a folder, DATA a JSONL of {"messages": [...]}, OUTPUT where the adapters go. Three lines are not
those of any other SFTTrainer; they are numbered.
"""

import sys

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from trl import SFTConfig, SFTTrainer

import flexreason as fr
from flexreason.train.trainer import RowTraining

ARGUMENTS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,  # conversations in a row
    "gradient_accumulation_steps": 4,
    "learning_rate": 1e-4,
    "weight_decay": 0.0,
    "bf16": torch.cuda.is_available(),
    "logging_steps": 1,
    "report_to": "none",
    "remove_unused_columns": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},  # it is encoded already
}
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


class RowSFTTrainer(RowTraining, SFTTrainer):
    """With what `fr.RowTrainer` has: evaluation by targets, losses of reasoning and response, whole checkpoints."""

    def compute_loss(self, *args, **kwargs):
        return Trainer.compute_loss(self, *args, **kwargs)  # the model's own loss: trl's does not tell targets apart


def train(model, dataset, output, tokenizer, kind=RowSFTTrainer, peft_config=LORA, **more):
    """The gradient of an optimizer step is that of the mean over all targets in its rows, on all processes.

    With `kind=SFTTrainer` too, whose loss never has the logits of all targets at once; its evaluation loss is the mean
    of the rows' means. Neither takes target weights other than 1.
    """
    trainer = kind(
        model=fr.patch(model),  # 1
        args=SFTConfig(output_dir=output, **{**ARGUMENTS, **more}),
        train_dataset=dataset,
        data_collator=fr.Collator(),  # 2
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def main(name, data, output):
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    dataset = datasets.load_dataset("json", data_files=data, split="train")
    encode = fr.EntryEncoder(tokenizer).columns
    dataset = dataset.map(encode, remove_columns=dataset.column_names)  # 3
    train(model, dataset, output, tokenizer).save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
