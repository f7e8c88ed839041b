"""What `flexreason train` costs beside its steps, and what one pass gains in a whole Trainer.

    python benchmarks/train.py                  # about ten minutes on two cores
    python benchmarks/train.py --repeats 1

*loop*: a run of the demo's model and data, from its first step to its last, by the bare steps: the same rows, made
before, forward, backward, clipping, optimizer. *data*: how many rows the data pipeline gives in the time of a step,
reading and collating documents on disk; and encoding them. *samples*: conversations of 8 turns of 64/256/64 tokens
through RowTrainer, by the stock Trainer on their N samples one by one with all logits, as plain fine-tuning does; and
the ratio of the work.
"""

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import flexreason as fr
from flexreason.data.documents import Documents
from flexreason.data.intake import EntryEncoder
from flexreason.demo import material
from flexreason.load import load_model
from flexreason.train.prepare import prepare
from flexreason.train.run import train
from flexreason.train.settings import Settings
from measure import interleaved, median_ratio, print_json, print_table
from step import SHAPES, conversation, model, work_ratio

STEPS = 40


class Clock(TrainerCallback):
    """When each step of a Trainer was over."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args, **kwargs) -> None:
        self.times.append(time.perf_counter())

    def on_step_end(self, *args, **kwargs) -> None:
        self.times.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """A step, the first two aside."""
        return (self.times[-1] - self.times[2]) / (len(self.times) - 3)


def loop(folder: Path, repeats: int) -> list[dict]:
    settings = {"model": str(folder / "start"), "data": [str(folder / "train.jsonl")], "length": material.ROW}
    settings |= {"steps": STEPS, "learning_rate": 1e-3, "log_every": 10, "warmup": 0.0}
    outputs = iter(range(10**6))

    def whole() -> float:
        output, clock = folder / f"run-{next(outputs)}", Clock()
        if (folder / "data").exists():  # encoded by an earlier one
            shutil.copytree(folder / "data", output / "data")
        train(Settings(**settings, output=str(output)), lambda words: None, [clock])
        if not (folder / "data").exists():
            shutil.copytree(output / "data", folder / "data")
        shutil.rmtree(output)
        return clock.seconds

    whole()  # encodes
    [documents] = (folder / "data").glob("*/documents.arrow")
    dealt = fr.Rows(Documents(documents), material.ROW, steps=STEPS)
    rows = [fr.Collator(material.ROW)([dealt[row]]) for row in range(STEPS)]

    def bare() -> float:
        m = fr.patch(load_model(str(folder / "start"), "float32", "cpu", 0, False)[0], loss="chunked").train()
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5 + 0.5 * math.cos(math.pi * n / STEPS))
        clock = Clock()
        clock.on_train_begin()
        for row in rows:
            m(**row).loss.backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            clock.on_step_end()
        return clock.seconds

    found = [(whole(), bare()) for _ in range(repeats)]
    wholes, bares = [a for a, _ in found], [b for _, b in found]
    ratio = median_ratio(wholes, bares)
    return [{"step": "train", "ms": 1e3 * min(wholes), "by bare": ratio}, {"step": "bare", "ms": 1e3 * min(bares)}]


def data(folder: Path, step: float) -> list[dict]:
    [documents] = (folder / "data").glob("*/documents.arrow")
    rows = fr.Rows(Documents(documents), material.ROW, epochs=3)
    start = time.perf_counter()
    n = sum(1 for _ in DataLoader(rows, batch_size=1, collate_fn=fr.Collator(material.ROW)))
    feeding = (time.perf_counter() - start) / n
    encoder = EntryEncoder(AutoTokenizer.from_pretrained(folder / "start"))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        prepare([str(folder / "train.jsonl")], encoder, Path(temporary), length=material.ROW)
    encoding = (time.perf_counter() - start) / (n / 3)
    return [
        {"pipeline": "from disk", "ms a row": 1e3 * feeding, "rows in the time of a step": step / feeding},
        {"pipeline": "encoding, once", "ms a row": 1e3 * encoding, "rows in the time of a step": step / encoding},
    ]


def samples(repeats: int) -> list[dict]:
    layout = conversation(SHAPES["8 x 64/256/64"])
    made = fr.unmerge(layout)
    plain = [
        {
            "input_ids": torch.tensor(s.prompt_ids + s.target_ids),
            "labels": torch.tensor([-100] * len(s.prompt_ids) + s.target_ids),
        }
        for s in made
    ]
    n_steps = 3

    def arguments(**more) -> TrainingArguments:
        return TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            max_steps=n_steps,
            per_device_train_batch_size=1,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            learning_rate=1e-5,
            bf16=False,
            **more,
        )

    single, stock = fr.patch(model()), model()

    def one_pass() -> None:
        rows = [[layout]] * n_steps
        fr.RowTrainer(model=single, args=arguments(), train_dataset=rows, data_collator=fr.Collator()).train()

    def n_samples() -> None:
        args = arguments(gradient_accumulation_steps=len(made))
        Trainer(model=stock, args=args, train_dataset=plain * n_steps).train()

    seconds = interleaved({"one": one_pass, "n": n_samples}, repeats)
    ratio, work = median_ratio(seconds["n"], seconds["one"]), work_ratio(stock, layout, naive=True)
    per_second = {name: n_steps * len(made) / min(values) for name, values in seconds.items()}
    return [
        {
            "trainer": "RowTrainer",
            "samples/s": per_second["one"],
            "faster": ratio,
            "work": work,
            "by work": ratio / work,
        },
        {"trainer": "Trainer, N samples", "samples/s": per_second["n"]},
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        material.save(folder, material.make(200, 10, 0))
        looped = loop(folder, options.repeats)
        print_table("The loop around the steps, demo's model, rows of 1024", looped)
        fed = data(folder, looped[1]["ms"] / 1e3)
        print_table("The data pipeline", fed)
    trained = samples(options.repeats)
    print_table("One pass in RowTrainer by N samples in the Trainer, 8 turns of 64/256/64, fp32", trained)
    print_json(benchmark="train", loop=looped, data=fed, samples=trained)


if __name__ == "__main__":
    main()
