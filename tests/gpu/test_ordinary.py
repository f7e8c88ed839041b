"""What is no row is as it was, to the bit; and a row given to a model that is not patched raises."""

import pytest
import torch

import flexreason as fr
from gpu.rule import alone, on, paper, warnings_allowed
from gpu.test_models import made

pytestmark = [pytest.mark.gpu, warnings_allowed]


def ordinary(model, device):
    """Logits of plain, padded and packed batches, and generated tokens."""
    ids = torch.randint(1, 97, (2, 30), generator=torch.Generator().manual_seed(0)).to(device)
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None].to(device)
    with torch.no_grad():
        return {
            "plain": model(input_ids=ids).logits,
            "left-padded": model(input_ids=ids, attention_mask=padded).logits,
            "packed": model(input_ids=ids[:1], position_ids=positions, use_cache=False).logits,
            "loss": model(input_ids=ids, labels=ids).loss,
            "generated": model.generate(
                input_ids=ids, attention_mask=padded, max_new_tokens=8, do_sample=False, pad_token_id=0
            ),
        }


@pytest.mark.parametrize(("family", "implementation"), [("Qwen3", "sdpa"), ("Mistral", "sdpa"), ("Gemma2", "eager")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_ordinary_batches_and_generation_are_the_same_to_the_bit(family, implementation, dtype, device):
    model = made(family, device, dtype, attn_implementation=implementation).eval()
    model.generation_config.eos_token_id = None
    before = ordinary(model, device)
    fr.patch(model)
    with torch.no_grad():
        model(**on(fr.collate([paper()]), device))
    during = ordinary(model, device)
    after = ordinary(fr.unpatch(model), device)
    for name, expected in before.items():
        assert torch.equal(during[name], expected), name
        assert torch.equal(after[name], expected), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["Qwen3", "Mistral"])
def test_a_row_given_to_a_model_that_is_not_patched_raises(family, implementation, device):
    model = made(family, device, torch.bfloat16, attn_implementation=implementation)
    row = on(fr.collate([paper()]), device)
    for without in ((), ("labels", "shift_labels")):
        given = {name: tensor for name, tensor in row.items() if name not in without}
        with pytest.raises((RuntimeError, ValueError, IndexError, AttributeError)):
            model(**given)
    assert torch.ones(3, device=device).sum().item() == 3  # the device is well: it raised before any kernel ran


UNPATCHED = """
import sys, torch
from flexreason import collate
from gpu.rule import on, paper
from gpu.test_models import made
device = sys.argv[1]
model = made("Qwen3", device, torch.bfloat16, attn_implementation="flex_attention")
row = on(collate([paper()]), device)
try:
    found = model(**{name: x for name, x in row.items() if "labels" not in name}).logits
    print("computed", float(found.float().sum()))
except (RuntimeError, ValueError, IndexError, AttributeError) as error:
    print("raised", type(error).__name__, str(error).splitlines()[0])
"""


def test_a_row_given_to_unpatched_flex_attention_raises(device):
    """In a process of its own: a kernel that reads beyond an empty mask would take the whole device with it."""
    out = alone("-c", UNPATCHED, device)
    assert out.startswith("raised"), out
    assert "illegal memory access" not in out, out
