"""Parts that are harmless by their own construction: each of their outputs is made of one token alone.

Only such parts may stand in a model that its class does not build (linear layers of a quantiser, adapters) without
anybody's having tried it. All others are tested, or refused until `fr.verify` has passed. So these are lists of what is
known, and what is on none of them counts as unknown: also new modules of torch, and of libraries that are listed.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

from flexreason.model.find import home_of, is_of

WRAPPED = (  # modules around others, which are looked at by themselves; and what works on weights alone
    *("torch.distributed", "torch.nn.parallel", "torch._dynamo", "torch.nn.utils", "accelerate"),
    *("deepspeed.runtime.engine", "deepspeed.runtime.zero"),
)

QUANTISED = (  # linear layers and embeddings, whose activations are not quantised or have scales of each token's own
    *("bitsandbytes.nn", "torchao.quantization", "torchao.dtypes", "gptqmodel.nn_modules.qlinear", "hqq.core"),
    *("auto_gptq.nn_modules.qlinear", "awq.modules.linear", "awq.modules.act", "optimum.quanto.nn", "quanto.nn"),
    *("eetq", "aqlm", "vptq", "auto_round", "auto_round_extension", "spqr_quant", "fp_quant"),
    *("compressed_tensors.linear", "deepspeed.linear", "deepspeed.module_inject.layers"),
    *(
        f"transformers.integrations.{name}"
        for name in (
            *("bitnet", "compressed_tensors", "eetq", "fbgemm_fp8", "finegrained_fp8", "gemma_quant", "ggml", "gguf"),
            *("higgs", "metal_quantization", "mxfp4", "quanto", "sinq", "tensor_parallel"),
        )
    ),
)

ADAPTERS = (  # of peft: tests/test_harmless.py asks each of them
    "peft.utils",
    *(
        f"peft.tuners.{name}"
        for name in (
            *("_buffer_dict", "adalora", "adaption_prompt", "beft", "boft", "c3a", "deft", "delora", "fourierft"),
            *("frod", "glora", "gralora", "hira", "hra", "ia3", "ln_tuning", "loha", "lokr", "lora", "lycoris_utils"),
            *("miss", "mixed", "oft", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shira", "supertuning"),
            *("tinylora", "trainable_tokens", "tuners_utils", "unilora", "vblora", "vera", "waveft"),
        )
    ),
)


def _any(module: Any) -> bool:
    return True


def _last(module: Any) -> bool:
    return module.dim == -1


def _one_dimension(module: Any) -> bool:
    return len(module.normalized_shape) == 1


OF_TORCH: dict[type[nn.Module], Callable[[Any], bool]] = {
    **dict.fromkeys(
        (
            *(nn.Module, nn.Sequential, nn.Identity, nn.Linear, nn.Bilinear, nn.Embedding, nn.Dropout),
            *(nn.AlphaDropout, nn.Threshold, nn.ReLU, nn.Hardtanh, nn.ReLU6),
            *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.SiLU, nn.Mish, nn.Hardswish, nn.ELU, nn.CELU, nn.SELU, nn.GELU),
            *(nn.Hardshrink, nn.LeakyReLU, nn.LogSigmoid, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanhshrink),
        ),
        _any,
    ),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _one_dimension),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.GLU), _last),
    nn.PReLU: lambda module: module.num_parameters == 1,  # else they are told apart by their second dimension
}
"""Modules of torch, and what must hold of one. Containers have no forward of their own, as `nn.Module` has none."""

FORWARDS: dict[Any, Callable[[Any], bool]] = {
    kind.forward: holds
    for kind, holds in OF_TORCH.items()
    if is_of(home_of(kind.forward), ("torch",))  # and nobody has put another one there
}
"""The same by their code, which classes that torch derives from them (for sharding, for parametrisations) share."""


def is_harmless(module: nn.Module) -> bool:
    """Whether a module is known to look at one token at a time. What it holds is looked at by itself."""
    kind = written_as(type(module))
    if _is_listed(kind):
        return True
    holds = FORWARDS.get(getattr(kind, "forward", None))  # which scripted modules do not have
    return _is_torchs(kind) and holds is not None and holds(module) and not quantises_rows(module)


@cache
def _is_listed(kind: type) -> bool:
    over_tokens = kind.__name__ in ("Conv1d", "MultiheadAttention")  # which adapters are made for, too
    return is_of(kind.__module__, (*WRAPPED, *QUANTISED, *ADAPTERS, "torch.nn.modules.loss")) and not over_tokens


def written_as(kind: type) -> type:
    """The class that somebody wrote: torch derives others from it, which it calls its own."""
    return next((base for base in kind.__mro__[:-1] if not _is_torchs(base)), kind) if _is_torchs(kind) else kind


def _is_torchs(kind: type) -> bool:
    return is_of(kind.__module__, ("torch",))


OF_ONE_TOKEN = re.compile(r"per_?(token|row|group|block)", re.IGNORECASE)


def quantises_rows(module: nn.Module) -> bool:
    """Whether a layer's weights quantise what the layer is given, by scales that may be of all tokens at once.

    Weights of torchao say how under one of these names.
    """
    for weight in module.parameters(recurse=False):
        ways = [getattr(weight, name, None) for name in ("act_quant_kwargs", "input_quant_func")]
        if any(way is not None and not OF_ONE_TOKEN.search(str(way)) for way in ways):
            return True
    return False


def code_of(module: nn.Module) -> str:
    """A short hash of the code that torch made of somebody's module (torch.fx, torch.jit), or nothing."""
    with contextlib.suppress(Exception):  # scripted modules have none where they have no forward
        code = getattr(module, "code", None) if _is_torchs(type(module)) else None
        return hashlib.sha256(code.encode()).hexdigest()[:8] if isinstance(code, str) else ""
    return ""
