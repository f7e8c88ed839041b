"""Run by several processes at once (torchrun): train, evaluate, and leave what came of it.

python -m torch.distributed.run --nproc-per-node 2 tests/ranks.py '{"how": "ddp", ...}'
"""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import flexreason as fr
from breaking import break_what_is_asked
from flexreason.data.documents import weighted
from flexreason.proof.float64 import true_float64
from models import tiny
from training import LENGTH, leave_together, some_layouts, trainer_arguments


def let_accelerate_shard_on_cpu():
    """accelerate has FSDP for accelerators only; told that this is one, it shards over gloo all the same."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def main(how, folder, weighting, accumulate, epochs=3):
    world = int(os.environ["WORLD_SIZE"])
    layouts = [weighted(layout, weighting) for layout in some_layouts()]
    more = {}
    if how == "fsdp2":
        let_accelerate_shard_on_cpu()
        wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}
        more = {"fsdp": True, "fsdp_config": {"version": 2, **wrap}}
    model = fr.patch(tiny("Qwen3").double())
    args = trainer_arguments(f"{folder}/checkpoints", gradient_accumulation_steps=accumulate, **more)
    rows = fr.Rows(layouts, LENGTH, epochs=epochs, multiple=world * accumulate, seed=3)
    if how == "stream":
        rows = fr.RowStream(layouts, LENGTH, multiple=world * accumulate, seed=3, pool=8)
        args.max_steps = sum(1 for _ in rows) // (world * accumulate)
    trainer = fr.RowTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=fr.Rows(layouts[:9], LENGTH, seed=1),  # three rows: accelerate repeats one
        data_collator=fr.Collator(LENGTH),
    )
    with true_float64():
        trainer.train()
        metrics = trainer.evaluate()
    parameters = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in trainer.model_wrapped.named_parameters()
    }
    if trainer.args.process_index == 0:
        sharded = any(isinstance(p, DTensor) for p in trainer.model_wrapped.parameters())
        wrapped = type(trainer.model_wrapped).__name__
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save({"parameters": parameters, "losses": losses}, f"{folder}/found.pt")
        Path(folder, "found.json").write_text(
            json.dumps({"metrics": metrics, "sharded": sharded, "wrapped": wrapped, "world": world})
        )
    leave_together()


if __name__ == "__main__":
    break_what_is_asked()
    main(**json.loads(sys.argv[1]))
