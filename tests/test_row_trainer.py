"""RowTrainer takes the steps of a loop over the samples, whatever the rows, accumulation, ranks and weights."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback

import flexreason as fr
from exact import EXACT
from flexreason.data.documents import weighted
from flexreason.memory import peak_bytes
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64
from flexreason.train import record
from flexreason.train.sums import target_roles, tokens_of
from flexreason.train.trainer import Broken, RowTraining
from models import tiny
from strategies import random_turns
from training import (
    LEARNING_RATE,
    LENGTH,
    environment,
    fit_by_hand,
    free_port,
    randomized,
    some_layouts,
    some_turns,
    steps_of,
    way_gone,
)
from training import (
    trainer_arguments as arguments,
)

HERE = Path(__file__).parent

STEPS = 20


def start_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_training(weighting, losses, expected, found, wanted, start):
    """Parameters to 1e-8, and the way they went too, where weights of 1 / n in float32 do not round it."""
    by_turn = weighting == "turn"
    assert losses == pytest.approx(expected, rel=1e-7 if by_turn else EXACT)
    assert way_gone(found, wanted, start) <= (1e-6 if by_turn else 1e-8)
    assert max(relative_l2([found[name]], [wanted[name]]) for name in wanted) <= 1e-8


@pytest.mark.parametrize(
    ("loss", "weighting", "accumulate"),
    [("model", "token", 1), ("chunked", "turn", 1), ("chunked", "token", 3), ("model", "turn", 3)],
)
def test_twenty_steps_are_those_of_the_loop(loss, weighting, accumulate, tmp_path):
    layouts = some_layouts()
    stock = tiny("Qwen3").double()
    model = fr.patch(tiny("Qwen3").double(), loss=loss)
    start = start_of(stock)
    given = [weighted(layout, weighting) for layout in layouts]
    rows = fr.Rows(given, LENGTH, steps=STEPS, multiple=accumulate, seed=3)
    trainer = fr.RowTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=accumulate),
        train_dataset=rows,
        data_collator=fr.Collator(LENGTH),
    )
    with true_float64():
        expected = fit_by_hand(stock, steps_of(rows, layouts), weighting)
        trainer.train()
    assert trainer.state.global_step == len(expected) == STEPS
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert_same_training(weighting, losses, expected, start_of(model), start_of(stock), start)


# transformers 5.23 renames what it calls gradient checkpointing; peft 0.21 uses the old name.
def test_lora_takes_the_steps_of_the_loop(tmp_path):
    def with_adapters():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        return randomized(peft.get_peft_model(tiny("Qwen3").double(), config))

    layouts = some_layouts()
    stock, model = with_adapters(), fr.patch(with_adapters())
    start = start_of(stock)
    rows = fr.Rows(layouts, LENGTH, steps=STEPS, multiple=2, seed=3)
    trainer = fr.RowTrainer(
        model=model,
        args=arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=rows,
        data_collator=fr.Collator(LENGTH),
    )
    with true_float64():
        fit_by_hand(stock, steps_of(rows, layouts))
        trainer.train()
    assert way_gone(start_of(trainer.model), start_of(stock), start) <= 1e-8


@pytest.mark.parametrize(
    ("how", "weighting", "accumulate"), [("ddp", "turn", 2), ("fsdp2", "token", 2), ("stream", "token", 1)]
)
def test_two_processes_take_the_steps_of_the_loop(how, weighting, accumulate, tmp_path):
    """Two real gloo processes; rows fall on ranks unevenly, and the last of an epoch are empty."""
    told = {"how": how, "folder": str(tmp_path), "weighting": weighting, "accumulate": accumulate}
    on_two_processes("ranks.py", told)
    said = json.loads((tmp_path / "found.json").read_text())
    assert said["world"] == 2
    assert said["sharded"] == (how == "fsdp2")
    found = torch.load(tmp_path / "found.pt")

    layouts = some_layouts()
    if how == "stream":
        rows = list(fr.RowStream(layouts, LENGTH, multiple=2 * accumulate, seed=3, pool=8))
        steps = [[*rows[at], *rows[at + 1]] for at in range(0, len(rows), 2)]
    else:
        dealt = fr.Rows(layouts, LENGTH, epochs=3, multiple=2 * accumulate, seed=3)
        rows, steps = [dealt[row] for row in range(len(dealt))], steps_of(dealt, layouts)
    targets = [sum(len(layout.target_ids) for layout in row) for row in rows]
    assert 0 in targets
    assert len(set(targets)) > 3
    stock = tiny("Qwen3").double()
    start = start_of(stock)
    with true_float64():
        expected = fit_by_hand(stock, steps, weighting)
        by_hand = evaluated_by_hand(stock, some_turns()[:9], weighting)
    assert len(fr.Rows(layouts[:9], LENGTH, seed=1)) % 2  # so that one row of the evaluation is repeated
    assert_same_training(weighting, found["losses"], expected, found["parameters"], start_of(stock), start)
    assert said["metrics"]["eval_targets"] == sum(len(layout.target_ids) for layout in layouts[:9])
    for name, value in by_hand.items():
        assert said["metrics"][f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


UNEVEN = {
    "list": ("list", 5, 1, 1, {}),
    "list in larger batches": ("list", 9, 3, 2, {"train_sampling_strategy": "sequential"}),
    "one document": ("list", 1, 1, 1, {}),
    "fewer documents than a batch": ("map", 3, 4, 1, {}),
    "dataset": ("map", 7, 2, 1, {}),
    "by length": ("table", 7, 2, 1, {"train_sampling_strategy": "group_by_length"}),
    "table": ("table", 5, 1, 2, {}),
    "stream": ("stream", 7, 2, 1, {"max_steps": 2}),
    "streamed table": ("streamed table", 5, 1, 1, {"max_steps": 3}),
    "rows": ("rows", 3, 1, 1, {"train_sampling_strategy": "sequential"}),
}


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of what two processes trained on and evaluated, case by case."""
    folder = tmp_path_factory.mktemp("uneven")
    names = ("kind", "n", "batch", "accumulate")
    cases = [
        {"name": name, "folder": str(folder), **dict(zip(names, told, strict=True)), **more}
        for name, (*told, more) in UNEVEN.items()
    ]
    on_two_processes("uneven.py", cases)
    return folder


@pytest.mark.parametrize("name", UNEVEN)
def test_two_processes_train_on_every_document_once_whatever_holds_them(name, uneven):
    """accelerate repeats the first documents where the last step or evaluation does not come out even."""
    _, n, batch, accumulate, _ = UNEVEN[name]
    found = [torch.load(uneven / f"{name}-{rank}.pt") for rank in range(2)]
    layouts = some_layouts()[:n]
    number_of = {tuple(layout.target_ids.tolist()): number for number, layout in enumerate(layouts)}
    assert len(number_of) == n

    def seen(when):
        """By process and row, the numbers of its documents."""
        return [[[number_of[tuple(ids)] for ids in row] for row in each["told"][when]] for each in found]

    for when in ("training", "evaluation"):
        one, other = seen(when)
        rounds = -(-n // (2 * batch))
        assert max(len(one), len(other)) == rounds  # no more than there must be
        assert all(len(row) <= batch for row in one + other)
        assert sorted(number for row in one + other for number in row) == list(range(n)), when
    one, other = seen("training")
    one, other = (rows + [[]] * (rounds - len(rows)) for rows in (one, other))
    both = [mine + its for mine, its in zip(one, other, strict=True)]
    steps = [[n for row in both[at : at + accumulate] for n in row] for at in range(0, rounds, accumulate)]
    stock = tiny("Qwen3").double()
    start = start_of(stock)
    with true_float64():
        expected = fit_by_hand(stock, [[layouts[number] for number in step] for step in steps])
        by_hand = evaluated_by_hand(stock, some_turns()[:n])
    for each in found:
        assert_same_training("token", each["losses"], expected, each["parameters"], start_of(stock), start)
        assert each["told"]["metrics"]["eval_targets"] == sum(len(layout.target_ids) for layout in layouts)
        for name, value in by_hand.items():
            assert each["told"]["metrics"][f"eval_{name}"] == pytest.approx(value, rel=1e-6), name


def on_two_processes(script, told):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *command, str(HERE / script), json.dumps(told)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def evaluated_by_hand(stock, conversations, weighting="token"):
    """Means of nll over all targets: by weight, by role and by turn."""
    total, weight = 0.0, 0.0
    sums = {}
    with torch.no_grad():
        for turns in conversations:
            history = []
            for turn, (h, t, r) in enumerate(turns):
                n = len(history) + len(h)
                ids = torch.tensor([[*history, *h, *t, *r]])
                logprobs = stock(input_ids=ids, use_cache=False).logits[0, n - 1 : -1].log_softmax(-1)
                nll = -logprobs.gather(1, ids[0, n:, None])[:, 0]
                w = 1 / len(nll) if weighting == "turn" else 1.0
                total, weight = total + w * float(nll.sum()), weight + w * len(nll)
                for at, value in enumerate(nll.tolist()):
                    for name in ("loss_reasoning" if at < len(t) else "loss_response", f"loss_turn_{turn}"):
                        sums.setdefault(name, []).append(value)
                history += [*h, *r]
    return {"loss": total / weight, **{name: sum(values) / len(values) for name, values in sums.items()}}


@pytest.mark.parametrize("weighting", ["token", "turn"])
def test_evaluation_is_the_mean_over_targets_and_not_over_rows(weighting, tmp_path):
    layouts = [weighted(layout, weighting) for layout in some_layouts(9)]
    model, stock = fr.patch(tiny("Qwen3").double()), tiny("Qwen3").double()
    held = [layouts[:1], layouts[1:6], [], layouts[6:]]
    trainer = fr.RowTrainer(model=model, args=arguments(tmp_path), eval_dataset=held, data_collator=fr.Collator(1024))
    trainer.args.per_device_eval_batch_size = 1
    with true_float64():
        found = trainer.evaluate()
        expected = evaluated_by_hand(stock, some_turns(9), weighting)
    for name, value in expected.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6), name
    assert found["eval_targets"] == sum(len(layout.target_ids) for layout in layouts)
    naive = Trainer(
        model=model,
        args=arguments(tmp_path),
        eval_dataset=[row for row in held if row],
        data_collator=fr.Collator(1024),
    )
    naive.args.per_device_eval_batch_size = 1
    if weighting == "turn":
        with pytest.raises(ValueError, match="the Trainer divides a step by its number of targets"):
            naive.evaluate()
        return
    assert naive.evaluate()["eval_loss"] != pytest.approx(expected["loss"], rel=1e-4)  # what is wrong without it


def test_targets_know_their_roles_and_rows_their_tokens():
    layouts = some_layouts(9)
    row = fr.collate(layouts)
    turns = [turn for turns in some_turns(9) for turn in turns]
    expected = [thought for _, t, r in turns for thought in [True] * len(t) + [False] * len(r)]
    found = target_roles(row)
    assert found[: len(expected)].tolist() == expected
    assert not found[len(expected) :].any()
    thinking = fr.Sample([5, 6], [7], prompt_roles=[fr.Role.PROMPT, fr.Role.REASONING])
    assert not target_roles(fr.collate([fr.lay_out([fr.Sample([1, 2], [3]), thinking])])).any()  # each its turn's last
    in_trees, in_samples = tokens_of(row)
    assert int(in_trees) == sum(map(len, layouts))
    assert int(in_samples) == sum(layout.sample_tokens for layout in layouts)
    assert [int(n) for n in tokens_of(fr.collate([]))] == [0, 0]


def test_the_weight_of_a_step_is_summed_over_its_rows():
    layouts = some_layouts(6)
    rows = [fr.collate(layouts[:2]), fr.collate([]), fr.collate(layouts[2:])]
    assert float(fr.total_weight(rows)) == sum(len(layout.target_ids) for layout in layouts)
    by_turn = [fr.collate([weighted(layout, "turn") for layout in layouts])]
    assert float(fr.total_weight(by_turn)) == pytest.approx(sum(layout.n_samples for layout in layouts))
    assert float(fr.total_weight([fr.collate([])])) == 0


def test_a_step_of_empty_rows_does_nothing(tmp_path):
    model = fr.patch(tiny("Qwen3").double())
    before = start_of(model)
    trainer = fr.RowTrainer(
        model=model, args=arguments(tmp_path), train_dataset=[[], []], data_collator=fr.Collator(LENGTH)
    )
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_training_logs_roles_and_tokens(tmp_path):
    layouts = some_layouts()
    rows = fr.Rows(layouts, LENGTH)
    model = fr.patch(tiny("Qwen3").double())
    args = arguments(tmp_path, logging_steps=len(rows), learning_rate=1e-12)
    trainer = fr.RowTrainer(model=model, args=args, train_dataset=rows, data_collator=fr.Collator(LENGTH))
    with true_float64():
        trainer.train()
        expected = evaluated_by_hand(tiny("Qwen3").double(), some_turns())
    [entry] = [entry for entry in trainer.state.log_history if "loss" in entry]
    for name in ("loss", "loss_reasoning", "loss_response"):
        assert entry[name] == pytest.approx(expected[name], rel=1e-6)
    ratio = entry["sample_tokens_per_second"] / entry["tree_tokens_per_second"]
    assert ratio == pytest.approx(sum(layout.sample_tokens for layout in layouts) / sum(map(len, layouts)))


@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(loss, tmp_path):
    model = fr.patch(tiny("Qwen3"), loss=loss)
    args = arguments(tmp_path, learning_rate=1e30, save_strategy="steps", save_steps=2, logging_steps=100)
    rows = fr.Rows(some_layouts(), LENGTH, steps=6)
    trainer = fr.RowTrainer(model=model, args=args, train_dataset=rows, data_collator=fr.Collator(LENGTH))
    with pytest.raises(Broken, match=r"step 2: .* holds no numbers; it is not saved"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    args = arguments(tmp_path, learning_rate=1e30, logging_steps=3)
    trainer = fr.RowTrainer(
        model=fr.patch(tiny("Qwen3"), loss=loss), args=args, train_dataset=rows, data_collator=fr.Collator(LENGTH)
    )
    with pytest.raises(Broken, match="step 3: loss is nan"):
        trainer.train()


def test_what_rows_need_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="not patched; call"):
        fr.RowTrainer(model=tiny("Qwen3"), args=arguments(tmp_path))
    assert issubclass(fr.RowTrainer, RowTraining)
    rows = fr.Rows(some_layouts(), LENGTH)
    args = arguments(tmp_path, per_device_train_batch_size=8)
    trainer = fr.RowTrainer(
        model=fr.patch(tiny("Qwen3")), args=args, train_dataset=rows, data_collator=fr.Collator(LENGTH)
    )
    assert len(trainer.get_train_dataloader()) == len(rows)  # an item is a batch, whatever the Trainer's default


def test_the_oracle_agrees_with_training_by_hand():
    """The loop of these tests is the oracle's."""
    layouts = some_layouts(3)
    stock = tiny("Qwen3").double()
    samples = [sample for layout in layouts for sample in fr.unmerge(layout)]
    with true_float64():
        reference = oracle.n_samples(stock, samples)
        start = start_of(stock)
        [loss] = fit_by_hand(stock, [layouts])
    assert loss == pytest.approx(reference.loss_sum / reference.n_targets, rel=EXACT)
    for name, p in stock.named_parameters():
        moved = (start[name] - p.detach()) / LEARNING_RATE * reference.n_targets
        assert torch.allclose(moved, reference.gradients[name], rtol=1e-7, atol=1e-9), name


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the peak")
def test_no_logits_of_all_targets_are_ever_held(tmp_path):
    """With the loss in chunks a step stays well below targets x vocabulary, which the model's own loss holds."""
    vocabulary, layouts = 80_000, [fr.lay_out_turns(random_turns([(5, 600, 20)] * 4, seed=seed)) for seed in range(2)]
    n_targets = sum(len(layout.target_ids) for layout in layouts)
    all_logits = 4 * n_targets * vocabulary
    peaks = {}
    for loss in ("chunked", "model"):
        model = fr.patch(tiny("Qwen3", vocab_size=vocabulary, num_hidden_layers=1), loss=loss)
        trainer = fr.RowTrainer(
            model=model, args=arguments(tmp_path), train_dataset=[layouts], data_collator=fr.Collator()
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 1
        with peak_bytes(torch.device("cpu")) as peak:
            before = peak()
            trainer.train()
            peaks[loss] = peak() - before
    assert peaks["model"] > all_logits
    assert peaks["chunked"] < 0.5 * all_logits


def test_what_the_trainer_would_do_to_rows_is_refused_or_set_right(tmp_path):
    layouts = some_layouts(9)

    def made(rows=None, **more):
        given = {key: more.pop(key) for key in ("compute_metrics", "compute_loss_func") if key in more}
        return fr.RowTrainer(
            model=fr.patch(tiny("Qwen3")),
            args=arguments(tmp_path, **more),
            train_dataset=fr.Rows(layouts, LENGTH) if rows is None else rows,
            data_collator=fr.Collator(LENGTH),
            **given,
        )

    with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func would shift"):
        made(label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor and compute_loss_func would shift"):
        made(compute_loss_func=lambda *given, **more: 0)
    with pytest.raises(ValueError, match="evaluation keeps no logits, so compute_metrics is never called"):
        made(compute_metrics=lambda found: {})
    with pytest.raises(ValueError, match=r"Rows: multiple: expected a multiple of a step's 4 rows .* found 2"):
        made(fr.Rows(layouts, LENGTH, multiple=2), gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match=r"RowStream: multiple: expected a multiple of a step's 4 rows .* found 1"):
        made(fr.RowStream(layouts, LENGTH), gradient_accumulation_steps=4, max_steps=1)
    trainer = made(average_tokens_across_devices=False)
    assert trainer.args.average_tokens_across_devices
    order = list(made(layouts)._get_train_sampler())
    assert sorted(order) == list(range(9))
    assert order != list(range(9))  # what is not `Rows` is shuffled as ever
    assert list(trainer._get_train_sampler()) == list(range(len(trainer.train_dataset)))


def test_tokens_that_the_model_has_not_are_told_before_a_row_is_moved(tmp_path):
    """In the loader, where every row is on the CPU: a GPU would only tell that an assertion failed."""
    seen = []
    model = fr.patch(tiny("Qwen3"))
    model.model.register_forward_pre_hook(lambda *given: seen.append(1))
    layout = fr.lay_out([fr.Sample([1, 2], [3, 97])])
    trainer = fr.RowTrainer(
        model=model, args=arguments(tmp_path), train_dataset=[layout], data_collator=fr.Collator(LENGTH)
    )
    for run in (trainer.train, lambda: trainer.evaluate([layout])):
        with pytest.raises(ValueError, match="tokens from 0 to 97, and the model's vocabulary has 97"):
            run()
    assert not seen


def test_rows_to_evaluate_may_be_given_late_or_under_names(tmp_path):
    layouts = some_layouts(9)
    held = fr.Rows(layouts, LENGTH)
    expected = fr.RowTrainer(
        model=fr.patch(tiny("Qwen3")), args=arguments(tmp_path), eval_dataset=held, data_collator=fr.Collator(LENGTH)
    ).evaluate()
    trainer = fr.RowTrainer(
        model=fr.patch(tiny("Qwen3")),
        args=arguments(tmp_path),
        eval_dataset={"held": held},
        data_collator=fr.Collator(LENGTH),
    )
    assert trainer.args.per_device_eval_batch_size == 8  # the Trainer's default, which a row is not
    assert trainer.evaluate()["eval_held_loss"] == pytest.approx(expected["eval_loss"])
    assert trainer.evaluate(held)["eval_loss"] == pytest.approx(expected["eval_loss"])


def test_going_on_and_the_best_one_mind_what_is_whole(tmp_path):
    layouts = some_layouts()

    def trainer(**more):
        return fr.RowTrainer(
            model=fr.patch(tiny("Qwen3")),
            args=arguments(tmp_path, save_strategy="steps", save_steps=1, **more),
            train_dataset=fr.Rows(layouts, LENGTH, steps=6),
            eval_dataset=fr.Rows(layouts[:4], LENGTH),
            data_collator=fr.Collator(LENGTH),
        )

    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer().train(resume_from_checkpoint=True)
    highest = {"metric_for_best_model": "eval_loss", "greater_is_better": True, "load_best_model_at_end": True}
    found = trainer(save_total_limit=2, eval_strategy="steps", eval_steps=1, **highest)
    found.train()
    best = max((e for e in found.state.log_history if "eval_loss" in e), key=lambda e: e["eval_loss"])
    assert best["step"] < 5
    assert {path.name for path in record.whole_checkpoints(tmp_path)} == {
        f"checkpoint-{n}" for n in (best["step"], 5, 6)
    }
    assert found.evaluate()["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)
    (tmp_path / "checkpoint-6" / record.SEAL).unlink()
    again, began_at = trainer(), []
    again.add_callback(BeginsAt(began_at))
    again.train(resume_from_checkpoint=True)
    assert began_at == [5]


class BeginsAt(TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)


def test_arguments_that_are_given_again_are_as_they_were(tmp_path):
    layouts, model = some_layouts(4), fr.patch(tiny("Qwen3"))
    more = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 4}
    args = arguments(tmp_path, max_steps=3, **more)
    before = args.to_dict()
    for data in (fr.Rows(layouts, LENGTH, steps=3), layouts):
        trainer = fr.RowTrainer(model=model, args=args, train_dataset=data, data_collator=fr.Collator())
        trainer.train()
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert args.to_dict() == before
    assert trainer.args.per_device_train_batch_size == 4


def test_tokens_that_are_seen_are_those_of_trees(tmp_path):
    layouts = some_layouts(4)
    args = arguments(tmp_path, include_num_input_tokens_seen="non_padding", per_device_train_batch_size=2)
    trainer = fr.RowTrainer(
        model=fr.patch(tiny("Qwen3")), args=args, train_dataset=layouts, data_collator=fr.Collator(1024)
    )
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(map(len, layouts))


def test_lengths_that_nobody_can_read_are_refused(tmp_path):
    args = arguments(tmp_path, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"group_by_length.* here are layouts; leave it out"):
        fr.RowTrainer(
            model=fr.patch(tiny("Qwen3")), args=args, train_dataset=some_layouts(4), data_collator=fr.Collator()
        )
