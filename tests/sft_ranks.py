"""Run by several processes at once (torchrun): RowSFTTrainer on conversations, and what came of it.

python -m torch.distributed.run --nproc-per-node 2 tests/sft_ranks.py '{"folder": ..., "lora": false}'
"""

import json
import os
import sys

import datasets
import torch

from breaking import break_what_is_asked
from flexreason.proof.float64 import true_float64
from test_sft_trainer import LORA, losses_of, randomized, start_of, trainer_of
from training import leave_together


def main(folder, lora):
    rank = int(os.environ["RANK"])
    data = datasets.load_dataset("json", data_files=f"{folder}/chats.jsonl", split="train", cache_dir=f"{folder}/cache")
    more = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 2}
    trainer = trainer_of(f"{folder}/run", data, peft_config=LORA if lora else None, **more)
    if lora:
        randomized(trainer.model)
    with true_float64():
        trainer.train()
        metrics = trainer.evaluate(data.select(range(7)))
    found = {"losses": losses_of(trainer), "parameters": start_of(trainer.model), "metrics": metrics}
    torch.save(found, f"{folder}/found-{rank}.pt")
    leave_together()


if __name__ == "__main__":
    break_what_is_asked()
    main(**json.loads(sys.argv[1]))
