"""What counts as harmless in a model looks at one token at a time; what does not is refused until somebody tried it."""

import types
import warnings

import peft
import pytest
import torch
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import nn

import flexreason as fr
from flexreason.proof import evidence
from flexreason.proof.harmless import ADAPTERS, OF_TORCH, is_harmless
from models import tiny
from strategies import random_turns

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUT = fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2), (3, 6, 4)]))


def moved(module, size=32):
    """How far other tokens' outputs move when one of five tokens is another."""
    x = torch.randn(1, 5, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, 2] = 3 - 2 * x[0, 2]
    outputs = []
    for given in (x, other):
        torch.manual_seed(1)
        outputs.append(module(given))
    return float((outputs[0] - outputs[1])[0, [0, 1, 3, 4]].abs().max())


ARGUMENTS = {
    nn.Linear: (32, 8),
    nn.LayerNorm: (32,),
    nn.RMSNorm: (32,),
    nn.Softmax: (-1,),
    nn.LogSoftmax: (-1,),
    nn.Softmin: (-1,),
    nn.Threshold: (0.1, 0.2),
}


@pytest.mark.parametrize("kind", OF_TORCH)
def test_harmless_modules_of_torch_look_at_one_token(kind):
    module = kind(*ARGUMENTS.get(kind, ())) if kind not in (nn.Bilinear, nn.Embedding) else None
    if module is not None and kind is not nn.Module:
        assert is_harmless(module)
        assert moved(module.double().train()) == 0


class Mix(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + torch.roll(x, 1, 1))


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x.roll(1, 1))


def parametrised(module):
    return torch.nn.utils.parametrizations.weight_norm(module)


MIXING = {
    "average pool": lambda: nn.AvgPool2d((3, 1), 1, (1, 0)),
    "group norm": lambda: nn.GroupNorm(1, 5),
    "instance norm": lambda: nn.InstanceNorm1d(5),
    "batch norm": lambda: nn.BatchNorm1d(5),
    "layer norm over tokens": lambda: nn.LayerNorm((5, 32)),
    "softmax over tokens": lambda: nn.Softmax(dim=1),
    "softmax over what comes": lambda: nn.Softmax(),
    "gated over tokens": lambda: nn.GLU(dim=1),
    "weights by token": lambda: nn.PReLU(5),
    "padding": lambda: nn.ZeroPad2d((0, 0, 1, -1)),
    "upsample": lambda: nn.Upsample(scale_factor=1),
    "convolution": lambda: nn.Conv1d(5, 5, 1),
    "fx": lambda: torch.fx.symbolic_trace(Mix(nn.Linear(32, 32))),
    "script": lambda: torch.jit.script(Mix(nn.Linear(32, 32))),
    "traced": lambda: torch.jit.trace(Mix(nn.Linear(32, 32)), torch.zeros(1, 5, 32)),
    "own": lambda: Own(32, 32),
    "own, parametrised": lambda: parametrised(Own(32, 32)),
    "dynamic scales": lambda: torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(32, 32)))[0],
}


@pytest.mark.parametrize("which", MIXING)
def test_modules_that_may_look_at_other_tokens_are_not_harmless(which):
    assert not is_harmless(MIXING[which]())


def test_an_edited_class_of_torch_is_not_harmless(monkeypatch):
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: plain(self, x.roll(1, 1)))
    assert not is_harmless(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="is refused: one pass is not the samples'"):
        fr.patch(tiny("Llama"))


def test_weights_that_quantise_activations_count():
    """As those of torchao do, which is not among the requirements: they are held by plain linear layers."""
    for way, harmless in (("Kwargs(granularity=PerTensor())", False), ("Kwargs(granularity=PerRow())", True)):
        module = nn.Linear(3, 3)
        module.weight.act_quant_kwargs = way
        assert is_harmless(module) == harmless


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.filterwarnings("default")
def test_linear_layers_of_eight_bits_whose_rounding_goes_by_the_row_are_taken_and_said(threshold, recwarn):
    kind = types.new_class("Linear8bitLt", (nn.Linear,), exec_body=lambda ns: ns.update(__module__="bitsandbytes.nn"))
    model = tiny("Llama")
    model.model.layers[0].mlp.up_proj = kind(32, 48)
    model.model.layers[0].mlp.up_proj.state = types.SimpleNamespace(threshold=threshold)
    fr.patch(model).train()(**fr.collate([LAYOUT]))
    assert any("llm_int8_threshold=0.0" in str(found.message) for found in recwarn) == (threshold > 0)


SIZES = (  # what one or another kind of adapter asks for
    *({}, {"r": 4}, {"block_size": 8}, {"oft_block_size": 4, "r": 0}, {"boft_block_size": 4}, {"vector_length": 8}),
    *({"n_frequency": 10}, {"total_step": 10, "init_r": 4, "target_r": 2}, {"feedforward_modules": []}),
)


def adapter(kind):
    """The first layer of a kind of adapter, with random weights, or nothing where there is none for one layer."""
    for more in SIZES:
        torch.manual_seed(0)
        try:
            config = PEFT_TYPE_TO_CONFIG_MAPPING[kind](
                **{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **more}
            )
            model = peft.get_peft_model(tiny("Llama", num_key_value_heads=4), config)
            break
        except Exception:
            continue
    else:
        return None, None
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    return model, next((m for name, m in model.double().named_modules() if name.endswith("0.self_attn.q_proj")), None)


@pytest.mark.parametrize("kind", sorted(PEFT_TYPE_TO_CONFIG_MAPPING.keys() - {"POLY", "TRAINABLE_TOKENS"}))
def test_harmless_adapters_of_peft_look_at_one_token(kind):
    """But for those that take more than states: tasks, and ids."""
    _, layer = adapter(kind)
    if layer is None or not type(layer).__module__.startswith("peft.tuners"):
        pytest.skip("no adapter of one layer")
    if all(map(is_harmless, layer.modules())):
        assert [moved(layer.train(training)) for training in (True, False)] == [0, 0]
    else:
        assert type(layer).__module__.split(".")[2] in ("lily", "shadow")


@pytest.mark.skipif(Version(peft.__version__) < Version("0.21"), reason="an older peft has fewer adapters")
def test_every_adapter_on_the_list_is_there():
    for name in ADAPTERS:
        assert __import__(name, fromlist=["_"])


def test_lily_is_refused():
    """Its router takes the mean over all tokens of the batch."""
    model, _ = adapter("LILY")
    with pytest.raises(ValueError, match=r"its adapter \(peft\.tuners\.lily.* lets each token see all others"):
        fr.patch(model)


@pytest.mark.parametrize("make", [torch.jit.script, torch.fx.symbolic_trace], ids=["script", "fx"])
def test_what_torch_makes_of_somebodys_module_is_told_by_its_code(make, monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())

    def model(of):
        made = tiny("Llama")
        made.model.layers[0].mlp = make(of(made.model.layers[0].mlp.up_proj))
        made.model.layers[0].mlp_down = None
        return made

    def plain(up):
        return nn.Sequential(up, nn.Linear(48, 32))

    def mixing(up):
        return nn.Sequential(Mix(up), nn.Linear(48, 32))

    for of in (plain, mixing):
        with pytest.raises(ValueError, match=r"parts of it were replaced, .*\(code "):
            fr.patch(model(of))
    assert fr.verify(model(plain).double(), [LAYOUT]).ok
    fr.patch(model(plain).double())
    with pytest.raises(ValueError, match="parts of it were replaced"):
        fr.patch(model(mixing).double())
    assert fr.verify(model(mixing).double(), [LAYOUT]).verdict == "NOT exact"


def test_classes_that_torch_derives_count_as_what_they_were_written_as():
    assert is_harmless(parametrised(nn.Linear(3, 3)))
    sharded = types.new_class("FSDPOwn", (Own,), exec_body=lambda ns: ns.update(__module__="torch.distributed.fsdp"))
    assert not is_harmless(sharded(3, 3))
    assert is_harmless(torch.compile(nn.Linear(3, 3)))
    assert is_harmless(nn.ModuleDict({"a": nn.Linear(3, 3)}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert is_harmless(peft.utils.ModulesToSaveWrapper(nn.Linear(3, 3), "default"))
