"""Folders: the files of the split that is asked for, no hidden ones, each once."""

import json
import shutil

import pytest

from flexreason.data.files import read_conversations
from flexreason.data.formats import BadInput
from flexreason.train.record import content_hash
from templating import answer, user


def write(path, text):
    """A file with one conversation, whose answer is the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entry = {"messages": [user("one"), answer(text)]}
    if path.suffix == ".parquet":
        pytest.importorskip("datasets").Dataset.from_list([entry]).to_parquet(path)
    else:
        path.write_text(json.dumps(entry) + "\n")


def read(folder, split="train"):
    return [found.messages[-1]["content"] for found in read_conversations(folder, split=split)]


LAYOUTS = {
    "files": {"train.jsonl": "train", "test.jsonl": "test"},
    "three": {"training.json": "train", "dev.ndjson": "validation", "eval.jsonl": "test"},
    "folders": {"train/a.jsonl": "train", "data/valid/a.jsonl": "validation", "data/validation/b.jsonl": "validation"},
    "numbered": {
        "data/train-00000-of-00002.parquet": "train",
        "data/train-00001-of-00002.parquet": "train",
        "data/test-00000-of-00001.parquet": "test",
    },
    "numbered, of other names": {
        "data/train_sft-00000-of-00001.parquet": "train_sft",
        "data/test_sft-00000-of-00001.parquet": "test_sft",
    },
    "words": {"chats-train_v2.jsonl": "train", "math.test.jsonl": "test", "Train 3.jsonl": "train"},
    "of several subsets": {"en/train-00000-of-00001.parquet": "train", "fr/train-00000-of-00001.parquet": "train"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_files_of_a_split_are_read(tmp_path, name):
    layout = LAYOUTS[name]
    for at, split in layout.items():
        write(tmp_path / at, f"{split}: {at}")
    for split in set(layout.values()):
        assert read(tmp_path, split) == sorted(f"{split}: {at}" for at in layout if layout[at] == split)
    splits = ", ".join(dict.fromkeys(layout[at] for at in sorted(layout)))
    with pytest.raises(BadInput, match=f"no split 'nonsense' in it; choose one of {splits}"):
        read(tmp_path, "nonsense")


def test_splits_are_those_of_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    for name in ("files", "three", "folders", "numbered", "numbered, of other names"):
        folder = tmp_path / name.replace(" ", "")
        for at in LAYOUTS[name]:
            write(folder / at.replace(".ndjson", ".jsonl"), at)
        made = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        assert {split: sorted(row["messages"][-1]["content"] for row in rows) for split, rows in made.items()} == {
            split: sorted(read(folder, split)) for split in made
        }


def test_a_split_has_several_names(tmp_path):
    write(tmp_path / "val.jsonl", "one")
    assert read(tmp_path, "validation") == read(tmp_path, "dev") == ["one"]
    with pytest.raises(BadInput, match="no split 'train' in it; choose one of validation"):
        read(tmp_path)


def test_files_without_splits_are_read_whole_where_no_other_split_is_asked_for(tmp_path):
    for name in ("latest.jsonl", "protest.jsonl", "part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"):
        write(tmp_path / name, name)
    assert len(read(tmp_path)) == 4
    with pytest.raises(BadInput, match="no split 'test' in it: its files name no splits; leave it out"):
        read(tmp_path, "test")


def test_what_cannot_be_told_is_refused_by_name(tmp_path):
    write(tmp_path / "some" / "train.jsonl", "one")
    write(tmp_path / "some" / "chats.jsonl", "two")
    with pytest.raises(BadInput, match=r"train.jsonl names a split, and chats.jsonl names none; rename one of them"):
        read(tmp_path / "some")
    write(tmp_path / "both" / "test" / "train.jsonl", "one")
    with pytest.raises(BadInput, match=r"test/train\.jsonl: its path names several splits, test, train; rename it"):
        read(tmp_path / "both")


def test_the_name_of_the_folder_itself_says_nothing(tmp_path):
    write(tmp_path / "test" / "chats.jsonl", "one")
    assert read(tmp_path / "test") == ["one"]


def test_what_is_hidden_is_not_read(tmp_path):
    write(tmp_path / "chats.jsonl", "one")
    hidden = [".ipynb_checkpoints/chats-checkpoint.jsonl", ".cache/train.jsonl", ".chats.jsonl", "__MACOSX/chats.jsonl"]
    for name in hidden:
        write(tmp_path / name, "again")
    (tmp_path / ".ipynb_checkpoints" / "old.jsonl.gz").write_bytes(b"")
    assert read(tmp_path) == ["one"]
    assert read(tmp_path / ".cache") == ["again"]  # asked for by name


def test_lines_have_several_endings_and_links_are_followed_once(tmp_path):
    data, other = tmp_path / "data", tmp_path / "other"
    for name in ("a.jsonl", "b.ndjson", "c.jsonlines"):
        write(data / name, name)
    write(other / "d.jsonl", "d.jsonl")
    (data / "other").symlink_to(other)
    (data / "same").symlink_to(other)
    (other / "back").symlink_to(data)
    before = content_hash(str(data))
    (data / ".hidden.jsonl").write_text("{}")
    assert content_hash(str(data)) == before
    write(other / "d.jsonl", "d.jsonl, changed")
    assert content_hash(str(data)) != before  # else what was encoded of it would be taken again
    write(other / "d.jsonl", "d.jsonl")
    assert sorted(read(data)) == ["a.jsonl", "b.ndjson", "c.jsonlines", "d.jsonl"]
    (data / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"gone\.jsonl"):
        read(data)


def test_tables_that_are_not_read_are_not_left_out_in_silence(tmp_path):
    write(tmp_path / "a.jsonl", "one")
    (tmp_path / "b.arrow").write_bytes(b"")
    with pytest.raises(BadInput, match=r"b\.arrow: files of this kind are not read; use \.parquet"):
        read(tmp_path)


def test_a_folder_with_a_description_of_its_data_is_read(tmp_path):
    """LLaMA-Factory's has one of the name that datasets uses too."""
    write(tmp_path / "chats.jsonl", "one")
    (tmp_path / "dataset_info.json").write_text('{"chats": {"file_name": "chats.jsonl"}}')
    assert read(tmp_path) == ["one"]


def test_a_saved_data_set_that_is_not_whole_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    parts = {name: datasets.Dataset.from_list([{"messages": [user("a"), answer(name)]}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert (read(tmp_path / "saved"), read(tmp_path / "saved", "test")) == (["train"], ["test"])
    with pytest.raises(BadInput, match="no split 'tset' in it; choose one of train, test; did you mean 'test'"):
        read(tmp_path / "saved", "tset")
    shutil.rmtree(tmp_path / "saved" / "test")
    with pytest.raises(BadInput, match=r"saved: cannot be read as a saved data set: .*; give one that is whole"):
        read(tmp_path / "saved")
