"""The demo: its task, its tokenizer, what its model answers, and the command."""

import json
import re

import pytest
import torch

import flexreason as fr
from exact import plain_pass
from flexreason.chat.encode import Encoder
from flexreason.chat.facts import describe
from flexreason.cli import main
from flexreason.commands.demo import claim
from flexreason.demo import answers, material, task, ways
from flexreason.demo.compare import WAYS
from flexreason.demo.learn import judge
from flexreason.demo.material import start
from flexreason.demo.ways import fit
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2

TOKENIZER = material.make_tokenizer()
TRAIN, HELD_OUT = task.make(300, 60, seed=0)


def asked_and_answered(messages):
    """(question, reasoning, answer) of every turn."""
    return [
        (user["content"], bot["reasoning_content"], int(bot["content"]))
        for user, bot in zip(messages[::2], messages[1::2], strict=True)
    ]


def expected(question, before):
    """The answer by Python's own arithmetic, from the question and the answers before it."""
    sign = {"plus": "+", "minus": "-", "times": "*"}
    if not before:
        return eval(question.removesuffix("?"))
    operation, digit = re.fullmatch(r"(plus|minus|times) (\d)\?", question).groups()
    return eval(f"{before[-1]}{sign[operation]}{digit}")


# --- the task


def test_every_answer_is_right_and_follows_from_the_one_before():
    for messages in TRAIN + HELD_OUT:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 4 <= len(messages) // 2 <= 6
        before = []
        for question, _, answer in asked_and_answered(messages):
            assert answer == expected(question, before)
            assert 0 <= answer <= 99
            before.append(answer)


def test_all_kinds_of_questions_are_asked_often():
    asked = [question for messages in TRAIN for question, _, _ in asked_and_answered(messages)[1:]]
    for kind in ("plus", "minus", "times"):
        assert sum(question.startswith(kind) for question in asked) >= len(asked) / 8


def test_the_same_follow_up_has_different_answers():
    """So it cannot be answered without the history."""
    found = {}
    for messages in TRAIN:
        for question, _, answer in asked_and_answered(messages)[1:]:
            found.setdefault(question, set()).add(answer)
    assert len(found) >= 20
    assert all(len(different) >= 5 for different in found.values())


def test_reasoning_works_it_out():
    """Every equation in it holds, it begins with the question in numbers, and its digits make the answer."""
    for messages in TRAIN:
        for _, reasoning, answer in asked_and_answered(messages):
            whole, steps = reasoning.replace("x", "*").split(": ")
            assert eval(whole) == answer
            ones, tens = steps.split(", ")
            for equation in (ones, tens):
                left, right = equation.split("=")
                assert eval(left) == int(right)
            assert int(tens.split("=")[1]) * 10 + int(ones.split("=")[1]) % 10 == answer


def test_held_out_conversations_share_no_prompt_with_training():
    def prompts(conversations):
        return {tuple(sample.prompt_ids) for m in conversations for sample in fr.unmerge(fr.encode(m, TOKENIZER))}

    assert not {messages[0]["content"] for messages in TRAIN} & {messages[0]["content"] for messages in HELD_OUT}
    assert not prompts(TRAIN) & prompts(HELD_OUT)


def test_a_seed_makes_the_same_again_and_another_seed_another():
    assert task.make(20, 5, seed=3) == task.make(20, 5, seed=3)
    assert task.make(20, 5, seed=3) != task.make(20, 5, seed=4)


# --- the tokenizer


def test_any_text_comes_back_from_its_tokens():
    for text in ("17+5?", " two  blanks\n", "é, 数, 🙂", "<user>a<end><bot><think>b</think>c<end>", "<thin", ""):
        ids = TOKENIZER(text).input_ids
        assert TOKENIZER.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text
    assert len(TOKENIZER("<think>").input_ids) == 1
    assert len(TOKENIZER("数").input_ids) == 3


def test_the_tokenizer_lies_in_a_folder_as_any_other(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    options = {"add_generation_prompt": True, "tokenize": False}
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.eos_token, loaded.pad_token) == ("<end>", "<pad>")
    assert loaded.apply_chat_template(TRAIN[0], **options) == TOKENIZER.apply_chat_template(TRAIN[0], **options)


def test_reasoning_is_dropped_from_history_and_kept_on_request():
    messages = [*TRAIN[0], {"role": "user", "content": "plus 1?"}]
    options = {"add_generation_prompt": True, "tokenize": False}
    text = TOKENIZER.apply_chat_template(messages, **options)
    assert "<think>" not in text
    assert all(reasoning not in text for _, reasoning, _ in asked_and_answered(TRAIN[0]))
    assert text.endswith("<user>plus 1?<end><bot>")
    kept = TOKENIZER.apply_chat_template(messages, preserve_thinking=True, **options)
    assert all(f"<think>{reasoning}</think>" in kept for _, reasoning, _ in asked_and_answered(TRAIN[0]))


def test_the_template_is_one_that_drops_reasoning():
    facts = {fact.key: fact.value for fact in describe(Encoder(TOKENIZER))}
    assert facts["history"] == "dropped"
    assert facts["stop"] == "<end>"


def test_samples_are_what_inference_sees_and_must_generate():
    found = fr.unmerge(fr.encode(TRAIN[0], TOKENIZER))
    history = ""
    for sample, (question, reasoning, answer) in zip(found, asked_and_answered(TRAIN[0]), strict=True):
        history += f"<user>{question}<end><bot>"
        assert TOKENIZER.decode(sample.prompt_ids) == history
        assert TOKENIZER.decode(sample.target_ids) == f"<think>{reasoning}</think>{answer}<end>"
        history += f"{answer}<end>"


# --- ways to train


@pytest.fixture
def model():
    """The demo's, with random weights."""
    from transformers import Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(material.config(TOKENIZER))


def gradients(model, backward, layouts):
    model.zero_grad()
    loss = backward(model, layouts)
    return loss, [p.grad.clone() for p in model.parameters()]


def test_one_row_and_padded_batches_are_the_mean_over_the_samples(model):
    layouts = [fr.encode(messages, TOKENIZER) for messages in TRAIN[:10]]
    samples = [sample for layout in layouts for sample in fr.unmerge(layout)]
    assert len(samples) > ways.PER_BATCH  # more than one padded batch
    expected = oracle.n_samples(model, samples)
    wanted = [expected.gradients[name] / expected.n_targets for name, _ in model.named_parameters()]
    for way in (ways.N_SAMPLES, ways.SINGLE_PASS):
        fr.patch(model) if way.rows else fr.unpatch(model)
        loss, found = gradients(model, way.backward, layouts)
        assert loss == pytest.approx(expected.loss_sum / expected.n_targets, rel=1e-5)
        assert relative_l2(found, wanted) < 1e-4


def test_the_last_turn_is_the_last_sample():
    last = fr.unmerge(fr.encode(TRAIN[0], TOKENIZER, **ways.LAST_TURN.options))
    assert [(s.prompt_ids, s.target_ids) for s in last] == [
        (s.prompt_ids, s.target_ids) for s in fr.unmerge(fr.encode(TRAIN[0], TOKENIZER))[-1:]
    ]


def test_the_leaking_pass_is_the_plain_one_over_the_whole_conversation(model):
    turns = [
        (
            TOKENIZER(f"<user>{question}<end><bot>").input_ids,
            TOKENIZER(f"<think>{reasoning}</think>").input_ids,
            TOKENIZER(f"{answer}<end>").input_ids,
        )
        for question, reasoning, answer in asked_and_answered(TRAIN[0])
    ]
    expected = -plain_pass(model, turns).mean()
    layout = fr.encode(TRAIN[0], TOKENIZER, **ways.LEAKING.options)
    assert set(layout.until.tolist()) == {len(layout)}  # one path: every token sees all before it
    loss = ways.LEAKING.backward(fr.patch(model), [layout])
    assert loss == pytest.approx(float(expected), rel=1e-5)
    right = oracle.n_samples(fr.unpatch(model), fr.unmerge(fr.encode(TRAIN[0], TOKENIZER)), gradients=False)
    assert abs(loss - right.loss_sum / right.n_targets) > 1e-3  # and it is not the right one


def test_a_text_of_the_template_is_one_path_with_the_reasoning_of_the_last_answer_alone():
    messages = TRAIN[0]
    layout = fr.encode(ways.AS_SHOWN.prepare(messages), TOKENIZER)
    assert set(layout.until.tolist()) == {len(layout)}
    assert layout.input_ids.tolist() == TOKENIZER.apply_chat_template(messages, return_dict=False)
    answers = [TOKENIZER(f"{answer}<end>").input_ids for _, _, answer in asked_and_answered(messages)]
    assert [sample.target_ids for sample in fr.unmerge(layout)][:-1] == answers[:-1]
    assert fr.unmerge(layout)[-1] == fr.unmerge(fr.encode(messages, TOKENIZER))[-1]


def test_all_ways_see_the_same_conversations(tmp_path):
    data = material.make(3, 3, 0)
    single, last = (data.batches(3, 0, **way.options) for way in (ways.SINGLE_PASS, ways.LAST_TURN))
    assert len(single) == 3
    for row, others in zip(single, last, strict=True):
        assert sum(map(len, row)) <= material.ROW
        for layout, other in zip(row, others, strict=True):
            assert fr.unmerge(layout)[-1].prompt_ids == fr.unmerge(other)[0].prompt_ids


def test_the_loop_learns_and_begins_where_it_should(tmp_path):
    data = material.make(3, 3, 0)
    material.save(tmp_path, data)
    batches = [data.batches(1, 0)[0][:2]] * 40
    model, other = start(tmp_path, 0, "cpu"), start(tmp_path, 0, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    losses = [step.loss for step in fit(model, ways.SINGLE_PASS, batches)]
    assert losses[-1] < 0.4 * losses[0]
    assert 200_000 < sum(p.numel() for p in model.parameters()) < 1_000_000


# --- answers


def test_side_by_side_is_the_same_as_one_by_one(tmp_path):
    """On a model that has learnt a little, so that answers end, and at different lengths."""
    data = material.make(3, 3, 0)
    material.save(tmp_path, data)
    model = start(tmp_path, 0, "cpu")
    list(fit(model, ways.SINGLE_PASS, [data.batches(1, 0)[0][:2]] * 40))
    together = answers.answer(model, TOKENIZER, HELD_OUT[:5])
    alone = answers.answer(model, TOKENIZER, HELD_OUT[:5], at_once=1)
    assert together == alone
    assert len({message["content"] for messages in together for message in messages[1::2]}) > 3


def test_answers_are_given_to_histories_of_the_models_own_answers_without_reasoning():
    seen = []

    class Parrot(torch.nn.Module):
        """Thinks "so", and answers with the number of tokens that it sees."""

        device = torch.device("cpu")

        def generate(self, input_ids, attention_mask, **options):
            lines = [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
            seen.extend(TOKENIZER.decode(line) for line in lines)
            texts = [f"<think>so</think>{len(line)}<end>" for line in lines]
            new = TOKENIZER(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
            return torch.cat([input_ids, new], 1)

    found = answers.answer(Parrot(), TOKENIZER, HELD_OUT[:3])
    for messages, reference in zip(found, HELD_OUT[:3], strict=True):
        assert [m["content"] for m in messages[::2]] == [m["content"] for m in reference[::2]]
        history = ""
        for question, answer in zip(messages[::2], messages[1::2], strict=True):
            history += f"<user>{question['content']}<end><bot>"
            assert history in seen
            assert answer["reasoning_content"] == "so"
            assert answer["content"] == str(len(TOKENIZER(history).input_ids))
            history += f"{answer['content']}<end>"


def test_generated_text_is_taken_apart_behind_its_reasoning():
    assert answers.as_message("<think>1+1</think>2") == {
        "role": "assistant", "reasoning_content": "1+1", "content": "2",
    }  # fmt: skip
    assert answers.as_message("<think>1+1") == {"role": "assistant", "content": "<think>1+1"}


def test_right_answers_are_counted():
    wrong = [dict(message) for message in HELD_OUT[0]]
    wrong[1]["content"] += "0"
    n = len(HELD_OUT[0]) // 2 + len(HELD_OUT[1]) // 2
    assert answers.right(HELD_OUT[:2], HELD_OUT[:2]) == (n, n)
    assert answers.right([wrong, HELD_OUT[1]], HELD_OUT[:2]) == (n - 1, n)


# --- the command


def test_goals_are_met_or_not():
    same = {"single_pass": [1.0] * 10, "apart": 1e-7}
    assert [goal.met for goal in judge(90, 100, [5.0, 1.25], same)] == [True, True, True]
    assert [goal.met for goal in judge(89, 100, [5.0, 1.25], same)] == [False, True, True]
    assert [goal.met for goal in judge(90, 100, [5.0, 1.3], same)] == [True, False, True]
    assert [goal.met for goal in judge(90, 100, [5.0, 1.25], same | {"apart": 1e-2})] == [True, True, False]


def test_a_few_steps_run_through_and_do_not_claim_success(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "2", "--held-out", "4", "--out", str(out), "--json"]) == 1
    told = capsys.readouterr()
    found = json.loads(told.out)
    assert [goal["met"] for goal in found["goals"]] == [False, False, True]
    assert told.err.count("NOT MET") == 2
    assert found["asked"] == sum(len(messages) // 2 for messages in material.make(2, 4, 0).held_out)
    assert found["beside_the_samples"]["apart"] < 1e-5
    assert len(found["losses"]) == 2
    for name in ("train.jsonl", "held_out.jsonl", "answers.jsonl", "train.yaml", "run/model/model.safetensors"):
        assert (out / name).is_file(), name
    assert fr.encode(json.loads((out / "train.jsonl").read_text().splitlines()[0])["messages"], TOKENIZER)


def test_ways_can_be_compared(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--compare", "--steps", "2", "--held-out", "2", "--out", str(out)]) == 0
    made = json.loads((out / "compare.json").read_text())
    found = made["ways"]
    single, samples = found["single pass"], found["N samples"]
    assert list(found) == [way.name for way in WAYS]
    assert samples["losses"] == pytest.approx(single["losses"], rel=1e-4)
    assert samples["held_out_loss"] == pytest.approx(single["held_out_loss"], rel=1e-4)
    assert single["targets"] == samples["targets"] == found["reasoning kept"]["targets"]
    assert found["last turn only"]["targets"] < single["targets"] / 3
    assert found["last turn only"]["targets"] < found["as the template shows it"]["targets"] < single["targets"]
    assert max(made["apart"]) < 1e-4
    told = capsys.readouterr().out
    assert "held-out answers right" in told
    assert "losses apart by at most" in told


def test_a_folder_of_others_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds files that are not the demo's" in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine"
    claim(tmp_path / "new")
    (tmp_path / "new" / "train.jsonl").write_text("the demo's")
    claim(tmp_path / "new")


@pytest.mark.parametrize(("given", "words"), [(["--steps", "0"], "--steps"), (["--out", "{file}"], "--out")])
def test_what_cannot_be_is_told_before_anything_is_done(tmp_path, capsys, given, words):
    file = tmp_path / "file"
    file.write_text("mine")
    assert main(["demo", *(word.format(file=file) for word in given)]) == 2
    assert words in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_the_goals_are_met(tmp_path):
    assert main(["demo", "--out", str(tmp_path)]) == 0
