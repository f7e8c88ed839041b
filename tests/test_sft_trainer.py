"""RowSFTTrainer takes the steps of a loop over the samples, whatever holds the conversations; what it is told that
contradicts rows is refused."""

import copy
import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import datasets
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, default_data_collator
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import flexreason as fr
from flexreason.chat.errors import ConversationError
from flexreason.data.documents import weighted
from flexreason.data.files import read_conversations
from flexreason.data.sets import encode_set
from flexreason.load import stand_in
from flexreason.proof.float64 import true_float64
from flexreason.train.arguments import CHECKPOINTING
from models import tiny
from test_row_trainer import on_two_processes, start_of
from training import (
    TEMPLATE,
    CollatorAsEver,
    environment,
    fit_by_hand,
    randomized,
    trainer_arguments,
    way_gone,
    write_data,
    write_model,
)

ROOT = Path(__file__).parents[1]

STEPS = 20
TOKENIZER = stand_in(TEMPLATE)
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    path = write_data(tmp_path_factory.mktemp("data") / "chats.jsonl", n=30, turns=3)
    return [json.loads(line) for line in path.read_text().splitlines()]


def layouts_of(conversations):
    return [fr.encode(each["messages"], TOKENIZER) for each in conversations]


class EncoderAsEver(fr.EntryEncoder):
    """A stream is encoded while training, and outside of true fp64."""

    def __call__(self, *given):
        with torch._C.DisableTorchFunction():
            return super().__call__(*given)


class Again:
    """An iterable that is no data set."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


KINDS = {
    "table": lambda found: datasets.Dataset.from_list(found),
    "encoded table": lambda found: datasets.Dataset.from_list(found).map(
        fr.EntryEncoder(TOKENIZER).columns, remove_columns=["messages"]
    ),
    "stream": lambda found: datasets.Dataset.from_list(found).to_iterable_dataset(num_shards=3),
    "list": list,
    "layouts": layouts_of,
    "iterable": Again,
}


def model_of(**more):
    return tiny("Qwen3", vocab_size=len(TOKENIZER), **more).double()


def arguments(folder, **more):
    given = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "max_steps": STEPS}
    return trainer_arguments(folder, SFTConfig, **{**given, CHECKPOINTING: False, **more})


def trainer_of(folder, data, model=None, peft_config=None, eval_dataset=None, skip_invalid=False, **more):
    return fr.RowSFTTrainer(
        model=model_of() if model is None else model,
        args=arguments(folder, **more),
        data_collator=CollatorAsEver(),
        train_dataset=data,
        eval_dataset=eval_dataset,
        processing_class=TOKENIZER,
        encode=EncoderAsEver(TOKENIZER),
        skip_invalid=skip_invalid,
        peft_config=peft_config,
    )


def steps_by_hand(conversations, n_steps=STEPS, batch=2):
    """The layouts of each step, in the order of the data; an epoch ends with a smaller step."""
    layouts = layouts_of(conversations)
    epoch = [layouts[at : at + batch] for at in range(0, len(layouts), batch)]
    return [epoch[n % len(epoch)] for n in range(n_steps)]


def flat(rows):
    return [document for row in rows for document in row]


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_steps(trainer, stock, expected, start):
    assert trainer.state.global_step == len(expected)
    assert losses_of(trainer)[-len(expected) :] == pytest.approx(expected, rel=1e-6)  # trainers add them in float32
    found, wanted = start_of(trainer.model), start_of(stock)
    assert way_gone(found, wanted, start) <= 1e-8


@pytest.mark.parametrize(
    ("kind", "lora", "accumulate"),
    [
        ("table", False, 1),
        ("table", True, 1),
        ("table", False, 4),
        ("encoded table", True, 2),
        ("stream", True, 2),
        ("list", False, 1),
        ("layouts", False, 2),
        ("iterable", False, 4),
    ],
)
def test_twenty_steps_are_those_of_the_loop(kind, lora, accumulate, conversations, tmp_path):
    """An epoch is 15 rows, so that it ends in the middle of an accumulated step."""
    model, seen = model_of(), []
    layouts = {tuple(layout.input_ids.tolist()): layout for layout in layouts_of(conversations)}
    model.model.register_forward_pre_hook(lambda _, given, row: seen.append(documents_of(row)), with_kwargs=True)
    more = {"peft_config": LORA if lora else None, "gradient_accumulation_steps": accumulate}
    trainer = trainer_of(tmp_path, KINDS[kind](conversations), model, **more)
    stock = model_of()
    if lora:
        stock, _ = randomized(peft.get_peft_model(stock, LORA)), randomized(trainer.model)
    start = start_of(stock)
    with true_float64():
        trainer.train()
        rows = [row for row in seen if row]
        epoch = [rows[n % 15] for n in range(len(rows))]
        if kind == "stream":  # whose shards come in an order of their own
            assert all(sorted(flat(rows[at : at + 15])) == sorted(layouts) for at in range(0, len(rows) - 14, 15))
        else:
            assert rows == epoch
        assert flat(epoch[:15]) == list(layouts)
        per_epoch = [rows[at : at + 15] for at in range(0, len(rows), 15)]
        steps = [flat(part[at : at + accumulate]) for part in per_epoch for at in range(0, len(part), accumulate)]
        expected = fit_by_hand(stock, [[layouts[ids] for ids in step] for step in steps])
    assert isinstance(trainer, SFTTrainer)
    assert_same_steps(trainer, stock, expected, start)
    assert len(expected) == STEPS


def test_checkpointing_which_is_trls_default_changes_nothing(conversations, tmp_path):
    """In float32: true float64 is not passed on to what is computed again."""
    found = []
    for asked in (False, True):
        model = tiny("Qwen3", vocab_size=len(TOKENIZER))
        trainer = trainer_of(tmp_path, conversations, model, LORA, max_steps=5, **{CHECKPOINTING: asked})
        randomized(trainer.model)
        computed = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, to=computed: to.append(1))
        trainer.train()
        found.append((losses_of(trainer), start_of(trainer.model), len(computed)))
    (losses, parameters, n), (losses_again, parameters_again, n_again) = found
    assert losses == losses_again
    assert all(torch.equal(parameters[name], parameters_again[name]) for name in parameters)
    assert n_again == 2 * n


@pytest.mark.parametrize("loss", ["model", "chunked"])
def test_weights_of_targets_count(loss, conversations, tmp_path):
    """trl's own loss knows none, and a row that has some is refused under SFTTrainer."""
    layouts = [weighted(layout, "turn") for layout in layouts_of(conversations)]
    trainer = trainer_of(tmp_path, layouts, fr.patch(model_of(), loss=loss), gradient_accumulation_steps=2, max_steps=5)
    stock = model_of()
    start = start_of(stock)
    with true_float64():
        expected = fit_by_hand(stock, steps_by_hand(conversations, 5, batch=4), "turn")
        trainer.train()
    assert way_gone(start_of(trainer.model), start_of(stock), start) <= 1e-6  # weights of 1 / n are float32
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(conversations, tmp_path):
    """From the last whole checkpoint, in the order that the data are shuffled into."""
    layouts = {tuple(layout.input_ids.tolist()): layout for layout in layouts_of(conversations)}
    assert len(layouts) == len(conversations)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 9

    def trained(seen, callbacks=()):
        model = model_of()
        model.model.register_forward_pre_hook(lambda _, given, row: seen.append(documents_of(row)), with_kwargs=True)
        more = {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 4}
        trainer = trainer_of(tmp_path, datasets.Dataset.from_list(conversations), model, **more)
        for callback in callbacks:
            trainer.add_callback(callback)
        return trainer

    before, after = [], []
    stopped, again = trained(before, [Stops()]), trained(after)
    stock = model_of()
    start = start_of(stock)
    with true_float64():
        stopped.train()
        again.train(resume_from_checkpoint=True)
        steps = [[layouts[ids] for ids in row] for row in before[:8] + after]
        expected = fit_by_hand(stock, steps)
    assert (len(before), len(after)) == (9, 12)
    epoch = [tuple(layout.input_ids.tolist()) for step in steps[:15] for layout in step]
    assert sorted(epoch) == sorted(layouts)  # each once
    assert epoch != list(layouts)
    assert_same_steps(again, stock, expected, start)


def documents_of(row):
    """The tokens of each document of a row."""
    document, ids = row["document"][0], row["input_ids"][0]
    return [tuple(ids[document == number].tolist()) for number in range(int(document.max()) + 1)]


@pytest.mark.parametrize("lora", [False, True])
def test_two_processes_take_the_steps_of_the_loop(lora, conversations, tmp_path):
    """Two real gloo processes, each given all conversations as they are; an epoch does not come out even."""
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, conversations)))
    on_two_processes("sft_ranks.py", {"folder": str(tmp_path), "lora": lora})
    found = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    stock = model_of()
    if lora:
        stock = randomized(peft.get_peft_model(stock, LORA))
    start = start_of(stock)
    assert len(conversations) % 8
    with true_float64():
        expected = fit_by_hand(stock, steps_by_hand(conversations, batch=8))
        by_hand = evaluated_by_hand(stock, conversations[:7])
    for each in found:
        assert each["losses"] == pytest.approx(expected, rel=1e-6)
        assert way_gone(each["parameters"], start_of(stock), start) <= 1e-8
        assert {name: each["metrics"][f"eval_{name}"] for name in by_hand} == pytest.approx(by_hand, rel=1e-6)


# --- evaluation


def evaluated_by_hand(stock, conversations):
    """Means over all targets of the samples: all of them, by role, by turn."""
    sums = {}
    with torch.no_grad():
        for each in conversations:
            for turn, sample in enumerate(EncoderAsEver(TOKENIZER).encoded(conversation_of(each)).samples):
                n = len(sample.prompt_ids)
                ids = torch.tensor([[*sample.prompt_ids, *sample.target_ids]])
                logits = stock(input_ids=ids, use_cache=False).logits[0, n - 1 : -1]
                nll = torch.nn.functional.cross_entropy(logits, ids[0, n:], reduction="none").tolist()
                for role, value in zip(sample.target_roles, nll, strict=True):
                    of_role = "loss_reasoning" if role & fr.Role.REASONING else "loss_response"
                    for name in ("loss", of_role, f"loss_turn_{turn}"):
                        sums.setdefault(name, []).append(value)
    return {**{name: sum(values) / len(values) for name, values in sums.items()}, "targets": len(sums["loss"])}


def conversation_of(entry):
    [conversation] = read_conversations([entry])
    return conversation


def test_evaluation_is_by_targets_of_one_set_of_several_and_of_one_given_late(conversations, tmp_path):
    sets = {"first": datasets.Dataset.from_list(conversations[:5]), "other": conversations[5:8]}
    trainer = trainer_of(tmp_path, conversations, eval_dataset=sets, eval_strategy="steps", eval_steps=1, max_steps=1)
    stock = model_of()
    with true_float64():
        late = trainer.evaluate(conversations[8:11])
        tested = trainer.predict(Again(conversations[8:11])).metrics
        both = trainer.evaluate()
        one = evaluated_by_hand(stock, conversations[:5])
        other = evaluated_by_hand(stock, conversations[5:8])
        third = evaluated_by_hand(stock, conversations[8:11])
        trainer.train()
    assert {name: both[f"eval_first_{name}"] for name in one} == pytest.approx(one, rel=1e-6)
    assert {name: both[f"eval_other_{name}"] for name in other} == pytest.approx(other, rel=1e-6)
    assert {name: late[f"eval_{name}"] for name in third} == pytest.approx(third, rel=1e-6)
    assert {name: tested[f"test_{name}"] for name in third} == pytest.approx(third, rel=1e-6)
    logged = trainer.state.log_history
    assert [entry for entry in logged if "loss" in entry and entry["loss_reasoning"] and entry["loss_response"]]
    assert {"eval_first_loss_response", "eval_other_loss_response"} <= {name for entry in logged for name in entry}


# --- what goes with rows, and what does not

WRONG = {
    "packing": (True, r"packing=True: a batch becomes one row already; for full rows .*fr.Rows\(layouts, length\)"),
    "eval_packing": (True, "eval_packing=True: a batch becomes one row already"),
    "padding_free": (True, "padding_free=True: a row has no padding"),
    "use_liger_kernel": (True, "use_liger_kernel=True: it replaces parts of the model when training starts"),
    "label_smoothing_factor": (0.1, "label_smoothing_factor=0.1: it would shift a row's targets"),
    "loss_type": ("dft", "loss_type='dft': the loss of a row is the negative log-likelihood"),
    "completion_only_loss": (False, "completion_only_loss=False: a row has its targets in answers"),
    "router_aux_loss_coef": (0.01, "router_aux_loss_coef=0.01: .* would count the tokens of the tree"),
    "neftune_noise_alpha": (5.0, "neftune_noise_alpha scales its noise by the length"),
    "compute_loss_func": (len, "compute_loss_func: it would shift a row's targets"),
    "compute_metrics": (len, "compute_metrics is never called"),
    "formatting_func": (len, "formatting_func: it makes one text of a conversation"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_contradicts_rows_is_refused_by_name(name, conversations, tmp_path):
    value, words = WRONG[name]
    others = {name: value} if name in ("compute_loss_func", "compute_metrics", "formatting_func") else {}
    args = arguments(tmp_path, **({} if others else {name: value}))
    given = {"model": model_of(), "args": args, "train_dataset": conversations, "processing_class": TOKENIZER}
    with pytest.raises(ValueError, match=words):
        fr.RowSFTTrainer(**given, **others)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"train_dataset": "chats.jsonl"},
            r"train_dataset: expected a data set, .*load_dataset\(.json., data_files=.chat",
        ),
        ({"eval_dataset": "chats.jsonl"}, "eval_dataset: expected a data set, found the text 'chats.jsonl'"),
        (
            {"train_dataset": datasets.DatasetDict(train=datasets.Dataset.from_list([]))},
            "found several by name.*'train'",
        ),
        ({"tokenizer": TOKENIZER}, "tokenizer: .*give processing_class=tokenizer"),
        (
            {"data_collator": DataCollatorForLanguageModeling(pad_token_id=0)},
            "ForLanguageModeling makes no rows; leave",
        ),
        ({"data_collator": default_data_collator}, "default_data_collator makes no rows; leave it out"),
    ],
)
def test_what_is_no_data_set_and_makes_no_rows_is_told_when_the_trainer_is_made(given, words, conversations, tmp_path):
    given = {"train_dataset": conversations, "processing_class": TOKENIZER, **given}
    with pytest.raises(ValueError, match=words):
        fr.RowSFTTrainer(model_of(), arguments(tmp_path), **given)


def test_a_collator_that_makes_no_rows_is_refused_in_words(conversations, tmp_path):
    def collator(items):
        return {"input_ids": torch.zeros(1, 3)}

    data = KINDS["encoded table"](conversations)
    trainer = fr.RowSFTTrainer(model_of(), arguments(tmp_path), collator, data, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match=r"data_collator: expected one that makes a row, such as fr.Collator\(\)"):
        trainer.train()


def test_noise_that_goes_by_a_rows_length_is_refused_of_the_row_trainer_too(tmp_path):
    with pytest.raises(ValueError, match="neftune_noise_alpha scales its noise by the length"):
        fr.RowTrainer(model=fr.patch(model_of()), args=trainer_arguments(tmp_path, neftune_noise_alpha=5))


GENERATION = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}</user>{% else %}<bot>{% generation %}"
    "{{ m.content }}</bot>{% endgeneration %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


@pytest.mark.parametrize("kind", ["pairs", "messages"])
def test_losses_of_answers_only_are_those_of_trl(kind, conversations, tmp_path):
    """completion_only_loss of prompts and completions, assistant_only_loss of messages: what rows do anyway. trl pads,
    and so does the oracle of one conversation a batch here, whose samples have no reasoning to drop."""
    tokenizer = stand_in(GENERATION)
    found = [[{"role": m["role"], "content": m["content"]} for m in each["messages"]] for each in conversations]
    if kind == "pairs":
        data = [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in found]
        asked = {"completion_only_loss": True}
    else:
        data, asked = [{"messages": messages} for messages in found], {"assistant_only_loss": True}
    data = datasets.Dataset.from_list(data)
    losses = []
    for trainer_class in (SFTTrainer, fr.RowSFTTrainer):
        trainer = trainer_class(
            model=tiny("Qwen3", vocab_size=len(tokenizer)),
            args=arguments(tmp_path, max_steps=5, max_length=None, per_device_train_batch_size=3, **asked),
            train_dataset=data,
            processing_class=tokenizer,
        )
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 5


def test_experts_train_without_their_auxiliary_loss(conversations, tmp_path):
    """trl adds it wherever a config has a coefficient."""

    def made():
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "router_aux_loss_coef": 0.1}
        model = tiny("Qwen3Moe", vocab_size=len(TOKENIZER), **experts).double()
        model.set_experts_implementation("eager")  # grouped matrix products take no float64
        return model

    trainer, stock = trainer_of(tmp_path, conversations, made(), max_steps=3), made()
    start = start_of(stock)
    with true_float64():
        expected = fit_by_hand(stock, steps_by_hand(conversations, 3))
        trainer.train()
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)
    moved = [name for name in start if not torch.equal(start[name], start_of(stock)[name])]
    found = start_of(trainer.model)
    wanted = {name: start_of(stock)[name] for name in moved}
    assert way_gone({n: found[n] for n in moved}, wanted, {n: start[n] for n in moved}) <= 1e-8


# --- data that are refused


BAD = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": ""}]}


@pytest.mark.parametrize("kind", ["table", "list"])
def test_refused_conversations_are_all_named_before_training_or_left_out(kind, conversations, tmp_path):
    data = KINDS[kind]([*conversations[:2], BAD, conversations[2], {**BAD}])
    with pytest.raises(ValueError, match=r"(?s)2 of 5 conversations are refused.*entry 2: message 1.*entry 4: mess"):
        trainer_of(tmp_path, data)
    with pytest.warns(UserWarning, match=r"(?s)2 conversations are left out.*entry 2: .*entry 4: "):
        trainer = trainer_of(tmp_path, data, skip_invalid=True)
    assert len(trainer.train_dataset) == 3
    with pytest.raises(ValueError, match="2 of 2 conversations are refused"):
        trainer_of(tmp_path, KINDS[kind]([BAD, BAD]), skip_invalid=True)


def test_a_stream_stops_at_the_first_that_is_refused_or_tells_of_each(conversations, tmp_path):
    data = KINDS["stream"]([*conversations[:2], BAD, *conversations[2:5]])
    with pytest.raises(ConversationError, match="entry 2: message 1"):
        trainer_of(tmp_path, data).train()
    trainer = trainer_of(tmp_path, data, skip_invalid=True, max_steps=2)
    with true_float64(), pytest.warns(UserWarning, match="left out .*entry 2: message 1"):
        trainer.train()
    with pytest.raises(ValueError, match="a generator can be gone over once only"):
        trainer_of(tmp_path, (each for each in conversations))


def test_nothing_is_cut(conversations, tmp_path):
    longest = max(int(layout.position_ids.max()) for layout in layouts_of(conversations)) + 2
    long = [{"messages": [{"role": "user", "content": "1" * 1200}, {"role": "assistant", "content": "2"}]}]
    [layout] = trainer_of(tmp_path, long).train_dataset  # trl would cut it at 1024
    assert len(layout) > 1024
    assert trainer_of(tmp_path, conversations, max_length=longest).train_dataset
    with pytest.raises(ValueError, match=rf"a sample of \d+ tokens, where {longest - 20} are the most; nothing is"):
        trainer_of(tmp_path, conversations, max_length=longest - 20)


def test_every_worker_of_a_loader_gives_its_share_of_an_iterable(conversations):
    stream, _ = encode_set(Again(conversations), fr.EntryEncoder(TOKENIZER))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(json.dumps(entry) for entry in loader) == sorted(map(json.dumps, conversations))


@pytest.mark.parametrize("kind", ["table", "list"])
def test_a_conversation_that_is_longer_than_a_row_is_told_when_the_trainer_is_made(kind, conversations, tmp_path):
    long = {"messages": [{"role": "user", "content": "1" * 150}, {"role": "assistant", "content": "2"}]}
    data = KINDS[kind]([*conversations, long])

    def made(length):
        given = {"args": arguments(tmp_path), "train_dataset": data, "processing_class": TOKENIZER}
        return fr.RowSFTTrainer(model=model_of(), data_collator=fr.Collator(length), **given)

    assert made(256).train_dataset
    with pytest.raises(ValueError, match=r"a tree of \d+ tokens, in rows of 128; use longer rows, or fr.split it"):
        made(128)


def test_the_page_on_long_conversations_makes_rows_of_one_length(conversations, tmp_path):
    """Every target is in one of the rows, once an epoch."""
    triples = zip(*(conversations[at::3] for at in range(3)), strict=True)
    conversations = [{"messages": [message for one in some for message in one["messages"]]} for some in triples]
    [block] = re.findall(
        r"```python\n(from flexreason.data.*?)```", (ROOT / "docs" / "howto" / "long.md").read_text(), re.S
    )
    assert block.count("8192") == 3
    given = {"fr": fr, "SFTConfig": lambda output_dir, **more: arguments(tmp_path, **{"max_steps": -1, **more})}
    given |= {"tokenizer": TOKENIZER, "data": conversations, "model": fr.patch(model_of())}
    exec(block.replace("8192", "128"), given)
    assert any(len(layout) > 128 for layout in layouts_of(conversations)), "some are split"
    targets = [sum(len(part.target_ids) for part in given["rows"][row]) for row in range(len(given["rows"]))]
    assert sum(targets) == 2 * sum(len(layout.target_ids) for layout in layouts_of(conversations))
    given["trainer"].train()
    assert given["trainer"].state.global_step == len(given["rows"]) // 4


# --- the script of its docstring, and what it needs


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A small model with weights under its name, and data."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "Qwen").mkdir()
    name = write_model(folder / "Qwen" / "Qwen3-0.6B")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name)).save_pretrained(name)
    write_data(folder / "chats.jsonl", n=60)
    return folder


def test_the_script_of_the_docstring_runs_as_it_stands(material):
    """In a folder that holds what it names, and with what it says of machines without a GPU."""
    script = textwrap.dedent(
        re.search(r"\n( +import flexreason.*?)\n\n    The same with", fr.RowSFTTrainer.__doc__, re.S)[1]
    )
    assert script.count('output_dir="runs/sft",') == 1
    done = subprocess.run(
        [sys.executable, "-c", script.replace('output_dir="runs/sft",', 'output_dir="runs/sft", use_cpu=True,')],
        cwd=material,
        env={**environment(), "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(material / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "eval_loss_reasoning" in done.stdout
    assert (material / "runs" / "sft" / "adapter_model.safetensors").exists()


def test_without_trl_it_can_be_looked_at_and_says_what_is_missing():
    code = """
import sys
sys.modules["trl"] = None
import flexreason as fr
from flexreason import *
assert "packing" in fr.RowSFTTrainer.__doc__
fr.RowSFTTrainer(model="m", train_dataset=[])
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert "ImportError: RowSFTTrainer: it is trl's SFTTrainer with rows, and trl cannot be imported" in done.stderr
    assert "pip install 'flexreason[sft]'" in done.stderr


def test_trl_is_imported_only_where_it_is_used():
    code = """
import flexreason as fr, sys
for name in ("RowTrainer", "RowSFTTrainer"):
    getattr(fr, name)
    print("trl" in sys.modules, end=" ")
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "False True "


needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed, and not among requirements"
)


@needs_bitsandbytes
@pytest.mark.parametrize("how", ["by name", "loaded", "patched"])
def test_adapters_over_four_bits_take_the_steps_of_the_loop(how, conversations, tmp_path):
    """QLoRA: what is quantized is the same weights for both, computed in fp32 here."""
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    name = str(tmp_path / "model")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # blocks of 64 are quantized together
    tiny("Qwen3", vocab_size=len(TOKENIZER), **sizes).save_pretrained(name)

    def loaded():
        return AutoModelForCausalLM.from_pretrained(name, quantization_config=four, dtype=torch.float32).train()

    given = {"by name": lambda: name, "loaded": loaded, "patched": lambda: fr.patch(loaded())}[how]()
    trainer = fr.RowSFTTrainer(
        model=given,
        args=arguments(tmp_path, max_steps=5),
        train_dataset=conversations,
        processing_class=TOKENIZER,
        peft_config=copy.copy(LORA),
        **({"quantization_config": four} if how == "by name" else {}),
    )
    assert any(type(module).__name__ == "Linear4bit" for module in trainer.model.modules())
    stock = peft.get_peft_model(loaded(), copy.copy(LORA))
    for model in (stock, trainer.model):
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data  # trl makes them bf16
        randomized(model)
    start = start_of(stock)
    expected = fit_by_hand(stock, steps_by_hand(conversations, 5))
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-4)
    assert way_gone(start_of(trainer.model), start_of(stock), start) <= 1e-3
