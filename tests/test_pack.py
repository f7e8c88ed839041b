"""Packing: every document once, rows full, the same rows again; and the collator."""

import random

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Trainer

import flexreason as fr
from flexreason.data.collator import Collator
from flexreason.data.intake import EntryEncoder
from flexreason.data.pack import Packer
from models import tiny
from strategies import random_turns
from training import trainer_arguments


def sizes_of(n, longest, seed=0):
    """Lengths as conversations have them: many short, few long."""
    draw = random.Random(seed)
    return [min(longest, 1 + int(draw.lognormvariate(7.3, 0.8))) for _ in range(n)]


def first_fit_decreasing(sizes, length):
    rooms = []
    for size in sorted(sizes, reverse=True):
        for k, room in enumerate(rooms):
            if size <= room:
                rooms[k] -= size
                break
        else:
            rooms.append(length - size)
    return len(rooms)


@pytest.mark.parametrize("length", [4096, 16384])
def test_every_document_once_and_rows_full(length):
    sizes = sizes_of(6000, length)
    rows = list(Packer(length).pack(enumerate(sizes)))
    assert sorted(number for row in rows for number in row) == list(range(len(sizes)))
    fill = [sum(sizes[number] for number in row) / length for row in rows]
    assert max(fill) <= 1
    assert sum(fill[:-1]) / len(fill[:-1]) >= 0.97
    best = sum(sizes) / length / first_fit_decreasing(sizes, length)
    assert sum(fill) / len(fill) >= best - 0.01


def test_the_pool_is_bounded_and_drained():
    packer = Packer(4096, pool=64)
    for number, size in enumerate(sizes_of(2000, 4096)):
        list(packer.add(number, size))
        assert len(packer.waiting) < 64
    assert sum(map(len, packer.flush())) < 64
    assert not packer.waiting
    assert not packer.sizes


def test_the_same_stream_and_seed_give_the_same_rows():
    """So the number of a row is all that is needed to go on from it."""
    numbers = random.Random(1).sample(range(10**6), 2000)  # in no order
    documents = [(number, -(-size // 256) * 256) for number, size in zip(numbers, sizes_of(2000, 4096), strict=True)]
    expected = list(Packer(4096, pool=100, seed=3).pack(documents))
    packer = Packer(4096, pool=100, seed=3)
    assert [row for document in documents for row in packer.add(*document)] + list(packer.flush()) == expected
    assert list(Packer(4096, pool=100, seed=4).pack(documents)) != expected


def test_what_fits_to_the_token_goes_in():
    packer = Packer(10, pool=2)
    assert list(packer.pack([(1, 7), (2, 3), (3, 10)])) in ([[1, 2], [3]], [[2, 1], [3]])


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="document 3 has 11 tokens, and a row 10; split it first"):
        list(Packer(10).add(3, 11))
    packer = Packer(10)
    list(packer.add(1, 5))
    with pytest.raises(ValueError, match="document 1 is waiting already"):
        list(packer.add(1, 5))
    with pytest.raises(ValueError, match="at least 1"):
        Packer(0)


def layouts(n):
    return [fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2)], seed=seed)) for seed in range(n)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_rows_at_any_batch_size(workers):
    given = layouts(6)
    expected = [fr.collate(given[i : i + 3], 256) for i in (0, 3)]
    for items, size in ((given, 3), ([given[:3], given[3:]], 1)):
        found = list(DataLoader(items, batch_size=size, collate_fn=Collator(256), num_workers=workers))
        for row, right in zip(found, expected, strict=True):
            assert row.keys() == right.keys()
            assert all(torch.equal(row[key], right[key]) for key in row)


def test_no_documents_are_an_empty_row():
    empty = fr.collate([], 256)
    for row in (Collator(256)([[]]), Collator(256)([[], []])):
        assert all(torch.equal(row[key], empty[key]) for key in empty)
    [layout] = layouts(1)
    row, expected = Collator(256)([[], [layout]]), fr.collate([layout], 256)
    assert all(torch.equal(row[key], expected[key]) for key in expected)


def test_columns_of_a_table_and_things_to_encode():
    [layout] = layouts(1)
    columns = {name: tensor.tolist() for name, tensor in vars(layout).items()}
    made = Collator(encode=lambda turns: fr.lay_out_turns(turns))([random_turns([(5, 7, 3), (4, 0, 2)])])
    expected = fr.collate([layout])
    for row in (Collator()([columns]), made):
        assert all(torch.equal(row[key], expected[key]) for key in row)
    with pytest.raises(ValueError, match="expected layouts, found dict with the keys messages; give encode="):
        Collator()([{"messages": []}])


def test_columns_that_a_trainer_took_out_are_told_with_its_argument(tmp_path):
    """By the stock Trainer, whose default it is: columns of layouts, of conversations, and rows."""
    [layout] = layouts(1)
    columns = {name: tensor.tolist() for name, tensor in vars(layout).items()}
    argument = "unless its arguments say remove_unused_columns=False"
    for item, encode, words in (
        (columns, None, f"found a layout without its columns role, target_ids, .*, until; .* {argument}"),
        (
            columns,
            EntryEncoder(None),
            f"neither messages, .*; Collator: found a layout without its columns .* {argument}",
        ),
        ({"messages": []}, None, f"found an item without any columns; .* {argument}"),
        ({"messages": []}, EntryEncoder(None), f"found an item without any columns; .* {argument}"),
        (fr.collate([layout]), None, argument),
    ):
        trainer = Trainer(
            model=fr.patch(tiny("Qwen3")),
            args=trainer_arguments(tmp_path),
            train_dataset=[item],
            data_collator=Collator(encode=encode),
        )
        with pytest.raises(ValueError, match=words):
            trainer.train()
    with pytest.raises(ValueError, match=r"found a row of fr\.collate, .* data_collator=lambda rows: rows\[0\]"):
        Collator()([fr.collate([layout])])
    with pytest.raises(ValueError, match="entry: neither messages") as error:
        Collator(encode=EntryEncoder(None))([{"text": "x"}])
    assert "remove_unused_columns" not in str(error.value)
    own = Collator(encode=lambda entry: fr.lay_out([fr.Sample(entry["input_ids"], [7])]))  # keys of a layout, and none
    assert own([{"input_ids": [5, 6]}])["input_ids"][0, :3].tolist() == [5, 6, 7]
