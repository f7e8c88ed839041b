"""Another transformers than the list's: what goes on untested, what is tested, and what is kept of it.

One test makes another transformers: the installed one, in which a single file is another. Its processes really import
that, and are held against what that file computes.
"""

import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

import flexreason as fr
from flexreason.cli import main
from flexreason.proof import evidence, kept, selftest, source
from flexreason.proof.tiny import default_config
from flexreason.tree.row import NoMask
from models import tiny

LLAMA = transformers.LlamaForCausalLM

EVERY = [name for name, entry in evidence.listed()["models"].items() if entry["verdict"] == "exact"]


@pytest.fixture
def newer(monkeypatch, tmp_path, caplog):
    """As if the list had been made of other files, and of this torch; with a folder of its own, and nothing known yet.
    Lines said."""
    models = {name: {**entry, "source": "another"} for name, entry in evidence.listed()["models"].items()}
    written = {**evidence.listed(), "models": models, "torch": torch.__version__.partition("+")[0]}
    monkeypatch.setattr(evidence, "listed", lambda: written)
    monkeypatch.setattr(evidence, "_results", {})
    monkeypatch.setenv("FLEXREASON_CACHE", str(tmp_path / "kept"))
    kept._say.cache_clear()
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def next_process(monkeypatch):
    """What a new process knows: nothing."""
    return evidence._results.clear


def files(tmp_path):
    return sorted((tmp_path / "kept" / "verdicts").iterdir())


def times_tested(lines):
    return sum("is tested on a tiny model" in line for line in lines)


# ---- what is said of it


@pytest.fixture
def later(newer, monkeypatch):
    """The same, and its version says so too."""
    for module in (transformers, evidence.transformers):  # which transformers makes anew while it is imported
        monkeypatch.setattr(module, "__version__", "99.0.0")
    return newer


def test_a_newer_transformers_is_told_in_words(later, monkeypatch, capsys):
    fr.patch(tiny("Llama"))
    [line] = [line for line in later() if "is tested on" in line]
    assert "since the transformers here is newer than the list of models: about a second" in line
    assert "99" not in line
    monkeypatch.setattr("flexreason.commands.models.listed", evidence.listed)
    assert main(["models"]) == 0
    assert "The transformers here is newer than that." in capsys.readouterr().out


def test_a_class_that_a_newer_transformers_has_changed_is_refused_in_words(later, monkeypatch, capsys):
    def forgets_its_tree(module, query, key, value, *args, **kwargs):
        return plain(module, query, key, value + 0.01 * value.mean(2, keepdim=True), *args, **kwargs)

    from flexreason.attention import registry

    plain = registry._tree_attention
    monkeypatch.setattr(registry, "_tree_attention", forgets_its_tree)
    with pytest.raises(ValueError, match="patch: LlamaForCausalLM is refused: the list of models knows it as") as error:
        fr.patch(tiny("Llama"))
    said = str(error.value)
    assert "in the transformers here, which is newer, it is another one: one pass is not the samples'; use the" in said
    assert "e-0" not in said
    assert f"pip install 'transformers=={evidence.listed()['transformers']}'" in said
    assert main(["models", "LlamaForCausalLM"]) == 1
    assert "which is newer, it is another one" in capsys.readouterr().out


def test_a_class_that_the_list_knows_as_refused_is_refused_for_its_own_reason(later):
    with pytest.raises(ValueError, match="recurrent layers") as error:
        fr.patch(transformers.MambaForCausalLM(transformers.MambaConfig(num_hidden_layers=1, hidden_size=32)))
    assert "newer" not in str(error.value)


# ---- what counts as the same


WATCHED = """
import json, sys, warnings
import transformers
from flexreason.proof import selftest, source
from flexreason.proof.tiny import default_config

warnings.simplefilter("ignore")
missing = {}
for name in sys.argv[1:]:
    cls, ran = getattr(transformers, name), set()
    config = default_config(cls)
    sys.setprofile(lambda frame, event, arg: ran.add(frame.f_globals.get("__name__", "")))
    try:
        selftest.check(config, cls)
    finally:
        sys.setprofile(None)
    ran = {module for module in ran if module.startswith("transformers.")}
    assert "transformers.modeling_utils" in ran
    left = ran - set(source.modules_of(cls, config))
    missing[name] = [module for module in left if not module.startswith(source.LEFT_OUT)]
print(json.dumps(missing))
"""


@pytest.mark.parametrize("names", [
    ("GptOssForCausalLM", "WhisperForCausalLM", "FuyuForCausalLM"), pytest.param(EVERY, marks=pytest.mark.slow),
], ids=["some", "all"])  # fmt: skip
def test_all_files_that_the_self_test_runs_are_in_the_hash(names):
    """Watched from outside, by Python's own profiler, in a process of its own: torch.compile leaves a hook on Python's
    frames behind, beside which the profiler may hang."""
    done = subprocess.run([sys.executable, "-c", WATCHED, *names], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {name: [] for name in names}


def test_every_exact_class_of_the_list_has_its_hash_and_nothing_is_tested():
    if transformers.__version__ != evidence.listed()["transformers"]:
        pytest.skip("the list is of another transformers")
    for name in EVERY[::8]:  # a new scan, marked slow, looks at all
        cls, entry = getattr(transformers, name), evidence.listed()["models"][name]
        assert source.source_of(cls, default_config(cls), entry["structure"]) == entry["source"], name
        assert not source.replaced_in_memory(cls, entry["structure"]), name


def test_a_class_that_takes_parts_from_other_models_has_their_files_too():
    found = source.modules_of(transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config())
    assert "transformers.models.siglip.modeling_siglip" in found
    assert "transformers.models.siglip.configuration_siglip" in found


class Own(LLAMA):
    pass


class OwnConfig(transformers.LlamaConfig):
    pass


def test_what_is_not_all_of_transformers_has_no_hash():
    assert source.source_of(Own, tiny("Llama").config, "own") == ""
    assert source.source_of(LLAMA, OwnConfig(), "own config") == ""


def test_a_file_that_changed_in_this_process_says_nothing_of_what_runs(tmp_path):
    """It may have been loaded anew since, as notebooks do, or not."""
    path = tmp_path / "modeling.py"
    path.write_text("a = 1")
    before = source.hash_of_all({"modeling": path})
    assert before == source.hash_of_all({"modeling": path}) != ""
    path.write_text("a = 2 ")
    assert source.hash_of_all({"modeling": path}) == ""
    path.unlink()
    assert source.hash_of_all({"modeling": path}) == ""


def test_a_class_whose_file_changed_in_this_process_is_tested_and_not_kept(newer, monkeypatch, tmp_path):
    path = tmp_path / "modeling_llama.py"
    path.write_text(Path(modeling_llama.__file__).read_text())
    monkeypatch.setattr(modeling_llama, "__file__", str(path))
    fr.patch(tiny("Llama"))
    assert len(files(tmp_path)) == 1
    path.write_text(path.read_text() + "# changed")
    evidence._results.clear()
    fr.patch(tiny("Llama"))
    assert times_tested(newer()) == 2
    assert len(files(tmp_path)) == 1


# ---- what is kept


def test_a_verdict_is_found_once_a_machine(newer, next_process, tmp_path, monkeypatch):
    fr.patch(tiny("Llama"))
    assert times_tested(newer()) == 1
    assert len(files(tmp_path)) == 1
    next_process()
    fr.patch(tiny("Llama"))
    assert times_tested(newer()) == 1
    next_process()
    fr.patch(tiny("Llama", attention_bias=True))  # another structure
    assert times_tested(newer()) == 2
    fr.patch(tiny("Llama"), "dense")  # another backend
    assert times_tested(newer()) == 3
    next_process()
    found = evidence.evidence_of_class(LLAMA, tiny("Llama").config)
    assert found.verdict == "exact"
    assert found.chunked is True


def test_a_refusal_is_kept_as_well(newer, next_process):
    cls = transformers.RobertaForCausalLM
    first = evidence.evidence_of_class(cls, default_config(cls))
    next_process()
    assert evidence.evidence_of_class(cls, default_config(cls)) == first
    assert first.verdict == "refused"
    assert "counts positions" in first.reason
    assert times_tested(newer()) == 1


def test_what_did_not_come_to_numbers_is_asked_anew(newer, next_process, tmp_path):
    """A package may be there tomorrow, or memory."""
    cls = transformers.XGLMForCausalLM
    for times in (1, 2):
        assert evidence.evidence_of_class(cls, default_config(cls)).verdict == "cannot be built tiny"
        assert times_tested(newer()) == times
        next_process()
    assert not (tmp_path / "kept" / "verdicts").is_dir() or not files(tmp_path)


def test_own_classes_are_not_kept(newer, next_process, tmp_path):
    fr.patch(Own(tiny("Llama").config))
    next_process()
    fr.patch(Own(tiny("Llama").config))
    assert times_tested(newer()) == 2
    assert not (tmp_path / "kept").exists()


def test_what_a_library_put_into_transformers_is_neither_kept_nor_passed_over(newer, next_process, monkeypatch):
    fr.patch(tiny("Llama"))
    next_process()
    plain = modeling_llama.apply_rotary_pos_emb
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: plain(q, k.roll(1, 2), *rest))
        with pytest.raises(ValueError, match="is refused: one pass is not the samples'"):
            fr.patch(tiny("Llama"))
    next_process()
    fr.patch(tiny("Llama"))
    assert times_tested(newer()) == 2


def test_what_torch_compile_leaves_in_transformers_modules_changes_no_verdict(newer, next_process, monkeypatch):
    """Its guards put classes of the inputs, such as that of a row's mask, into the modules that it read."""
    fr.patch(tiny("Llama"))
    monkeypatch.setattr(modeling_llama, "__subclass_NoMask_94426783241152_c13", NoMask, raising=False)
    next_process()
    fr.patch(tiny("Llama"))
    assert times_tested(newer()) == 1


LFM2 = selftest.Result("Lfm2ForCausalLM", "refused", "it has a convolution", 8e-3, 8e-2, 0.5, ["QK-norm"])


@pytest.fixture
def asked(newer):
    """Ask for a verdict on Lfm2; how many times it had to be found so far."""
    found = []

    def ask():
        about = {"name": LFM2.name, "source": "s", "structure": "t", "backend": "segments"}
        assert kept.recall(about, lambda: found.append(1) or LFM2) == LFM2
        return len(found)

    return ask


BESIDE = {
    "flexreason": (kept, "own_source", lambda: "another"),
    "torch": (torch, "__version__", "1.13.0"),
    "transformers": (kept.transformers, "__version__", "0.0"),
    "python": (platform, "python_version", lambda: "2.7"),
    "machine": (platform, "machine", lambda: "abacus"),
}


@pytest.mark.parametrize("which", BESIDE)
def test_what_was_found_beside_something_else_is_not_believed(which, asked, monkeypatch, tmp_path):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(*BESIDE[which])
        assert asked() == 1
    assert asked() == 2
    assert asked() == 2
    one, other = files(tmp_path)
    text = one.read_text()
    one.write_text(other.read_text())  # whole, and about something else
    other.write_text(text)
    assert asked() == 3


def test_the_hash_of_flexreason_is_of_all_its_source():
    root = Path(fr.__file__).parent
    some = {str(path.relative_to(root)): path for path in root.rglob("*.py")}
    assert source.own_source() == source.hash_of_all(some)
    del some["attention/segments.py"]
    assert source.own_source() != source.hash_of_all(some)


def forged(written):
    """Exact, says someone who can compute a digest."""
    written["found"]["verdict"], written["found"]["reason"] = "exact", ""
    written["digest"] = kept._digest([written["about"], written["found"]])
    return json.dumps(written)


def about_another(written):
    written["about"]["source"] = "another"
    written["digest"] = kept._digest([written["about"], written["found"]])
    return json.dumps(written)


BROKEN = {
    "nothing": lambda written: "",
    "half": lambda written: json.dumps(written)[:200],
    "no dict": lambda written: "[1]",
    "bytes": lambda written: "\x00\xff",
    "another verdict": lambda written: json.dumps({**written, "found": {**written["found"], "verdict": "exact"}}),
    "one word": lambda written: json.dumps({**written, "found": {**written["found"], "reason": ""}}),
    "no numbers": lambda written: json.dumps({**written, "found": {"verdict": "exact"}}),
    "forged": forged,
    "about another": about_another,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_poisoned_file_is_not_believed_and_is_mended(how, asked, newer, tmp_path):
    assert asked() == 1
    (path,) = files(tmp_path)
    whole = path.read_text()
    path.write_text(BROKEN[how](json.loads(whole)))
    assert asked() == 2
    assert any("is not believed" in line for line in newer())
    assert files(tmp_path) == [path]
    assert path.read_text() == whole
    assert asked() == 2


@pytest.mark.parametrize("how", ["a file is in the way", "it cannot be replaced", "off"])
def test_where_nothing_can_be_kept_it_goes_on_with_a_word(how, newer, next_process, tmp_path, monkeypatch):
    if how == "off":
        monkeypatch.setenv("FLEXREASON_CACHE", "off")
        monkeypatch.setenv("HOME", str(tmp_path))
    elif how == "a file is in the way":
        (tmp_path / "kept").write_text("")
    else:
        monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no space left")))
    for _ in range(2):
        fr.patch(tiny("Llama"))
        next_process()
    assert times_tested(newer()) == 2
    assert sum("cannot be kept" in line for line in newer()) == (how != "off")
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"kept", "verdicts"}


def test_who_reads_while_others_write_finds_a_whole_file(newer, tmp_path):
    about, path = {"name": LFM2.name}, tmp_path / "kept" / "verdicts" / "one.json"
    kept._write(path, about, LFM2)

    def one(number):
        if number % 2:
            return kept._read(path, about)
        return kept._write(path, about, LFM2)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(2000)))
    assert all(result == LFM2 for result in found[1::2])
    assert newer() == []
    assert files(tmp_path) == [path]


def test_a_rank_that_hangs_is_not_waited_for_for_ever(asked, monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = tmp_path / "kept" / "verdicts"
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    monkeypatch.setattr(kept, "PATIENCE", 0.1)
    assert asked() == 1
    os.close(held)
    assert asked() == 1


def test_the_folder_is_the_users_cache_folder_or_the_one_that_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("FLEXREASON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.folder() == tmp_path / "flexreason"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.folder() == tmp_path / ".cache" / "flexreason"
    monkeypatch.setenv("FLEXREASON_CACHE", "~/elsewhere")
    assert kept.folder() == tmp_path / "elsewhere"


# ---- another transformers, in processes of its own

RANK = """
import logging
import flexreason as fr, torch, transformers
config = transformers.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8)
try:
    fr.patch(transformers.LlamaForCausalLM(config))
    print("taken")
except ValueError as error:
    print(error)
"""


def linked(real, copy, changed):
    """The folder `real` again, by links, but for the one file at `changed`; its folders are real ones."""
    copy.mkdir()
    for entry in real.iterdir():
        if entry.name != changed[0]:
            (copy / entry.name).symlink_to(entry)
    if len(changed) > 1:
        return linked(real / changed[0], copy / changed[0], changed[1:])
    return copy / changed[0], (real / changed[0]).read_text()


def ranks(site, n, folder):
    """Processes at once, on many threads; what each prints, and how many of them tested."""
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{Path(fr.__file__).parents[1]}", "FLEXREASON_CACHE": folder}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, "-c", RANK], env=env, **pipes) for _ in range(n)]
    ended = [process.communicate(timeout=240) for process in started]
    return [out.strip() for out, _ in ended], times_tested([line for _, err in ended for line in err.splitlines()])


def test_another_transformers_is_tested_by_one_rank_and_once(tmp_path):
    """In it, llama's keys are those of the token before: the list's own verdict on it would be silently wrong."""
    path, text = linked(
        Path(transformers.__file__).parent, tmp_path / "transformers", ("models", "llama", "modeling_llama.py")
    )
    line = "        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)\n"
    assert text.count(line) == 1
    path.write_text(text.replace(line, f"{line}        key_states = key_states.roll(1, 2)\n"))
    folder = str(tmp_path / "kept")
    said, tested = ranks(tmp_path, 2, folder)
    assert all("is refused: one pass is not the samples'" in words for words in said), said
    assert tested == 1
    assert ranks(tmp_path, 1, folder) == (said[:1], 0)
