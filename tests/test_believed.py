"""What was found out in this process is believed of the same code and values only, whatever they are called."""

import collections
import functools
import time
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import flexreason as fr
from exact import EXACT, errors
from flexreason.proof import evidence, source
from flexreason.proof.identity import identity
from flexreason.proof.parts import parts_of
from models import tiny
from strategies import random_turns

LAYOUT = fr.lay_out_turns(random_turns([(5, 7, 3), (4, 0, 2)], 0))

NOT_THE_SAMPLES = "is refused: one pass is not the samples'"


def shift(x):
    """The token before, in storage, is added."""
    return x + nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


def made(kind, *options, **config):
    return kind(tiny("Qwen3", **config).config, *options)


def assert_taken(model):
    fr.unpatch(fr.patch(model))
    assert max(errors(model.double(), [LAYOUT]).values()) <= EXACT


# ---- classes of transformers that were edited


def test_an_edit_in_the_clothes_of_what_it_replaced_is_one(monkeypatch):
    plain = Qwen3MLP.forward
    monkeypatch.setattr(Qwen3MLP, "forward", functools.wraps(plain)(lambda self, x: plain(self, shift(x))))
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(tiny("Qwen3"))
    monkeypatch.setattr(Qwen3MLP, "forward", functools.wraps(plain)(lambda self, x: plain(self, x) * 1.0))
    assert_taken(tiny("Qwen3"))


def test_an_edit_after_another_is_another(monkeypatch):
    plain = Qwen3MLP.forward
    for change in (lambda x: x * 1.0, shift, lambda x: x * 2.0, shift):
        monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x, change=change: plain(self, change(x)))
        if change is shift:
            with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
                fr.patch(tiny("Qwen3"))
        else:
            fr.unpatch(fr.patch(tiny("Qwen3")))


def test_a_function_put_into_a_module_is_an_edit_too(monkeypatch):
    plain = modeling_qwen3.apply_rotary_pos_emb

    def mixing(q, k, cos, sin, **kwargs):
        q, k = plain(q, k, cos, sin, **kwargs)
        return q, k + nn.functional.pad(k, (0, 0, 1, 0))[..., :-1, :]

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", mixing)
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(tiny("Qwen3"))
    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", lambda *args, **kwargs: plain(*args, **kwargs))
    fr.patch(tiny("Qwen3"))


class Rotary:
    def __call__(self, *args, **kwargs):
        return modeling_qwen3.rotate_half(*args, **kwargs)


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial,
        functools.lru_cache,
        functools.singledispatch,
        functools.partialmethod,
        torch.jit.script_if_tracing,
        lambda function: Rotary(),
        lambda function: Rotary().__call__,
        lambda function: torch.compile(function, backend="eager"),
        lambda function: torch.jit.script(nn.functional.relu),
    ],
)
def test_whatever_calls_somebodys_code_is_an_edit(wrap, monkeypatch):
    cls, config = Qwen3ForCausalLM, tiny("Qwen3").config
    structure = evidence.structure_of(config, cls)
    source.source_of(cls, config, structure)
    assert not source.replaced_in_memory(cls, structure)
    monkeypatch.setattr(modeling_qwen3, "rotate_half", wrap(shift))
    monkeypatch.setattr(Qwen3MLP, "forward", functools.partialmethod(shift))
    replaced = source.replaced_in_memory(cls, structure)
    assert set(replaced) == {f"{modeling_qwen3.__name__}.{name}" for name in ("rotate_half", "Qwen3MLP")}


def warmer(stock):
    return lambda module, query, *args, **kwargs: stock(module, query * 1.3, *args, **kwargs)


def test_attention_that_somebody_put_there_is_an_edit(monkeypatch):
    """Rows do not go through it, and samples do."""
    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", warmer(ALL_ATTENTION_FUNCTIONS["sdpa"]))
        with pytest.raises(ValueError, match=r"; somebody replaced attention 'sdpa' in this process"):
            fr.patch(tiny("Qwen3"))
    monkeypatch.setattr(modeling_qwen3, "eager_attention_forward", warmer(modeling_qwen3.eager_attention_forward))
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(tiny("Qwen3", attn_implementation="eager"))
    fr.patch(tiny("Qwen3"))


def test_a_file_that_changed_since_it_was_first_seen_is_not_believed(tmp_path):
    path = tmp_path / "modeling.py"
    path.write_text("x = 1\n")
    first = source.hash_of_all({"m": path})
    path.write_text("x = 2\n")
    assert source.hash_of_all({"m": path}) == ""
    path.write_text("x = 1\n")
    assert source.hash_of_all({"m": path}) == first != ""


# ---- classes of one's own


class MLP(Qwen3MLP):
    def forward(self, x):
        return super().forward(x)


class Edited(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = MLP(config)


SHIFTS = False


def helped(x):
    return shift(x) if SHIFTS else x


class ByGlobal(Qwen3MLP):
    def forward(self, x):
        return super().forward(helped(x))


class Global(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ByGlobal(config)


def edit_in_place(monkeypatch):
    monkeypatch.setattr(MLP, "forward", lambda self, x: Qwen3MLP.forward(self, shift(x)))


def edit_its_code(monkeypatch):
    """As autoreload does."""

    def forward(self, x):
        return Qwen3MLP.forward(self, shift(x))

    own = MLP.forward
    monkeypatch.setattr(MLP, "forward", types.FunctionType(own.__code__, own.__globals__, closure=own.__closure__))
    code, closure = forward.__code__, own.__closure__
    MLP.forward.__code__ = code.replace(co_freevars=("__class__",)) if closure else code


@pytest.mark.parametrize("edit", [edit_in_place, edit_its_code])
def test_a_class_of_ones_own_that_is_edited_is_tested_again(edit, monkeypatch):
    assert_taken(made(Edited))
    edit(monkeypatch)
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(made(Edited))


def test_what_its_code_names_counts(monkeypatch):
    fr.unpatch(fr.patch(made(Global)))
    monkeypatch.setitem(globals(), "SHIFTS", True)
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(made(Global))


class Switched(Qwen3MLP):
    shifts = False

    def forward(self, x):
        return super().forward(shift(x) if self.shifts else x)


class Optional(Qwen3ForCausalLM):
    """With an option that is not in its config."""

    def __init__(self, config, shifts=False):
        super().__init__(config)
        self.width = config.hidden_size
        for layer in self.model.layers:
            layer.mlp = Switched(config)
            if shifts:
                layer.mlp.shifts = True

    def forward(self, *args, **kwargs):
        assert self.width
        return super().forward(*args, **kwargs)


def test_an_option_of_a_constructor_is_a_part(monkeypatch):
    monkeypatch.setattr(evidence, "_verified", set())
    assert_taken(made(Optional))
    assert_taken(made(Optional, hidden_size=40, num_hidden_layers=3))
    with pytest.raises(ValueError, match=r"parts of it were replaced, .* Switched.shifts = True; run fr.verify"):
        fr.patch(made(Optional, True))
    assert fr.verify(made(Optional, True).double(), [LAYOUT]).verdict == "NOT exact"


class Gated(Qwen3MLP):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x):
        return super().forward(x + self.gate * (shift(x) - x))


class WithGates(Qwen3ForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[1].mlp = Gated(config)


def test_a_number_in_a_buffer_is_what_it_is_in_the_model():
    """As a checkpoint may bring it, which the class knows nothing of."""
    model = made(WithGates)
    assert_taken(model)
    model.model.layers[1].mlp.gate.fill_(1)
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(model)


class ByNumber(Qwen3ForCausalLM):
    """One of its layers is another one, by a setting of its config that nobody else knows."""

    def __init__(self, config):
        super().__init__(config)
        for number, layer in enumerate(self.model.layers):
            layer.mlp = Switched(config)
            layer.mlp.shifts = number == getattr(config, "shift_at", -1)


def test_every_layer_of_an_unknown_class_is_tested():
    fr.patch(made(ByNumber, num_hidden_layers=6))
    with pytest.raises(ValueError, match=NOT_THE_SAMPLES):
        fr.patch(made(ByNumber, num_hidden_layers=6, shift_at=4))


# ---- what was verified


def around(shifts):
    class Around(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.mlp = mlp

        def forward(self, x):
            return self.mlp(shift(x) if shifts else x)

    return Around


class Held(nn.Module):
    def __init__(self, mlp, shifts):
        super().__init__()
        self.mlp, self._shifts = mlp, shifts

    def forward(self, x):
        return self.mlp(shift(x) if self._shifts else x)


@pytest.mark.parametrize("put", [lambda mlp, shifts: around(shifts)(mlp), Held])
def test_what_was_verified_is_believed_of_the_same_code_and_values_only(put, monkeypatch):
    def model_of(shifts):
        model = tiny("Qwen3").double()
        for layer in model.model.layers:
            layer.mlp = put(layer.mlp, shifts)
        return model

    monkeypatch.setattr(evidence, "_verified", set())
    assert fr.verify(model_of(False), [LAYOUT]).ok
    fr.patch(model_of(False))
    with pytest.raises(ValueError, match="is refused: parts of it were replaced"):
        fr.patch(model_of(True))


class Options:
    __slots__ = ("shifts",)

    def __init__(self, shifts):
        self.shifts = shifts

    def apply(self, x):
        return shift(x) if self.shifts else x


class WithOptions(nn.Module):
    def __init__(self, mlp, shifts):
        super().__init__()
        self.mlp, self.options = mlp, Options(shifts)

    def forward(self, x):
        return self.mlp(self.options.apply(x))


def by_an_objects_method(mlp, shifts):
    plain, options = mlp.forward, Options(shifts)
    options_apply = options.apply
    mlp.forward = lambda x: plain(options_apply(x))
    return mlp


def by_a_value_of_the_module(mlp, shifts):
    plain, mlp.shifts = mlp.forward, shifts
    mlp.forward = types.MethodType(lambda self, x: plain(shift(x) if self.shifts else x), mlp)
    return mlp


SWITCH = torch.tensor(False)


def by_a_tensor(mlp, shifts):
    plain = mlp.forward
    SWITCH.fill_(shifts)
    mlp.forward = lambda x: plain(shift(x) if SWITCH else x)
    return mlp


@pytest.mark.parametrize("put", [WithOptions, by_an_objects_method, by_a_value_of_the_module, by_a_tensor])
def test_parts_differ_where_what_their_code_works_with_does(put):
    def parts(shifts):
        model = tiny("Qwen3")
        for layer in model.model.layers:
            layer.mlp = put(layer.mlp, shifts)
        return parts_of(model)

    assert parts(False) == parts(False) != parts(True)


def test_a_function_in_the_place_of_a_method_is_a_part():
    model = tiny("Qwen3Moe", num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    before, experts = parts_of(model), model.model.layers[0].mlp.experts
    model.generate = lambda *args: None  # which no forward calls
    assert parts_of(model) == before
    plain = experts._apply_gate
    experts._apply_gate = lambda states: plain(states) * len(states)
    [part] = parts_of(model) - before
    assert part.is_foreign
    assert part.words.startswith("_apply_gate of Qwen3MoeExperts, by ")


# ---- identities


def remembering(x):
    return x * remembering.calls


remembering.calls = 0


def test_code_is_the_same_by_its_text_and_what_it_works_with():
    def scaled(by, **options):
        def call(x, offset=by):
            return by * x + offset

        return call

    assert identity(scaled(2)) == identity(scaled(2))
    assert identity(scaled(2)) != identity(scaled(3))
    assert identity(scaled(1)) != identity(scaled(True))
    assert identity(functools.partial(shift, 1)) != identity(functools.partial(shift, 2))
    assert identity([1, {"a": (2,)}]) == identity([1, {"a": (2,)}])
    assert identity(torch.nn.functional.relu) == identity(torch.nn.functional.relu)
    assert identity(Edited) != identity(Global)
    assert identity(Options(1)) == identity(Options(1)) != identity(Options(2))
    assert identity(Options(1).apply) == identity(Options(1).apply) != identity(Options(2).apply)
    assert identity(collections.deque([1])) != identity(collections.deque([2]))
    assert identity(torch.tensor([1.0])) == identity(torch.tensor([1.0])) != identity(torch.tensor([2.0]))
    assert identity(np.ones(2)) == identity(np.ones(2)) != identity(np.zeros(2))
    assert identity(functools.lru_cache(scaled(2))) == identity(functools.lru_cache(scaled(2)))
    assert identity(functools.lru_cache(scaled(2))) != identity(functools.lru_cache(scaled(3)))
    before = identity(remembering)
    remembering.calls += 1
    assert identity(remembering) != before
    loop = [1]
    loop.append(loop)
    assert identity(loop) == identity(loop)
    assert hash(identity(Edited)) == hash(identity(Edited))


# ---- modules of torch


@pytest.mark.parametrize(
    "mixing",
    [
        lambda: nn.AvgPool2d((3, 1), 1, (1, 0)),
        lambda: nn.Softmax(dim=1),
        lambda: nn.InstanceNorm1d(32),
        lambda: nn.Upsample(size=32),
        lambda: nn.ZeroPad1d(0),
    ],
)
def test_modules_of_torch_that_may_mix_tokens_are_parts(mixing):
    model = tiny("Qwen3")
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, mixing())
    with pytest.raises(ValueError, match=r"parts of it were replaced, .*torch\.nn\.modules\..*; run fr.verify"):
        fr.patch(model)


def test_modules_of_torch_that_see_one_token_are_none():
    model, mlp = (
        tiny("Qwen3"),
        nn.Sequential(nn.Linear(32, 8), nn.GELU(), nn.RMSNorm(8), nn.Dropout(0.0), nn.Linear(8, 32)),
    )
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, mlp, nn.Identity(), nn.Tanh())
    assert_taken(model)


def test_values_that_lead_ever_on_are_looked_into_so_far_only():
    """Code may name what holds everything else of a session."""

    class Link:
        def __init__(self, more=None):
            self.more = more

    first = None
    for _ in range(5000):
        first = Link(first)
    assert identity(first) == identity(first)
    assert identity(first) != identity(Link(first))
    wide = [[Link() for _ in range(900)] for _ in range(900)]
    start = time.perf_counter()
    identity(wide)
    assert time.perf_counter() - start < 5
