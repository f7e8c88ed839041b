"""The kernels that flex compiles to on a GPU, run by triton's interpreter on a CPU: what they compute, and backward.

    python tests/interpreting.py        # in a fresh process, with triton installed; prints a line of JSON a case

`attend` of the flex backend is traced on meta tensors, its graphs are relabelled as CUDA ones and lowered by inductor
for compute capability 9.0, as if a card were there; the kernels that it writes are interpreted. Output and gradients
are held against the dense backend in fp64, beside what dense attention itself loses in the same precision.
"""

import contextlib
import copy
import importlib.util
import json
import os
import re
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # which triton reads when it is imported

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import flexreason as fr
from flexreason.attention import dense, flex
from flexreason.tree.blocks import BLOCK

CAPABILITY = (9, 0)
MULTIPROCESSOR = {"registers": 2**16, "shared": 228 * 1024, "threads": 2048, "blocks": 32}
SHARED_A_BLOCK = 227 * 1024
CARD = types.SimpleNamespace(
    name="H200",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    cc=90,
    uuid="",
    gcnArchName="",
    total_memory=140 * 2**30,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=MULTIPROCESSOR["threads"],
    regs_per_multiprocessor=MULTIPROCESSOR["registers"],
    shared_memory_per_block=48 * 1024,
    shared_memory_per_block_optin=SHARED_A_BLOCK,
    shared_memory_per_multiprocessor=MULTIPROCESSOR["shared"],
    L2_cache_size=50 * 2**20,
)

LISTS = [f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]
"""The eight lists of a BlockMask."""


@dataclass(frozen=True)
class Case:
    """One way into flex: a layer and a row."""

    name: str
    size: int = 64
    key_heads: int = 1
    group: int = 2
    dtype: torch.dtype = torch.float16  # the interpreter takes bf16 for integers; fp16 has the same tiles
    mask: str = "interval"
    limits: dict[str, int] = field(default_factory=dict)
    softcap: float | None = None
    sinks: bool = False
    block_size: int | tuple[int, int] = BLOCK
    length: int = 384
    turn: tuple[int, int, int] = (64, 16, 16)  # tokens of h, t and r, which make full blocks too
    options: dict[str, Any] = field(default_factory=dict)


# --- pretending a card ---


class _Driver:
    """What triton asks a driver for when it compiles for a given card."""

    utils = types.SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": SHARED_A_BLOCK})

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


@contextlib.contextmanager
def pretended_card() -> Iterator[None]:
    """Everything that inductor asks a card is answered as an H200 would, on any machine, and left as it was behind."""
    import torch._inductor.graph
    import torch._subclasses.fake_tensor
    import torch.utils._triton
    import triton
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers

    def answer(value: Any = None) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    stream = types.SimpleNamespace(cuda_stream=0, device=torch.device("cuda", 0), device_index=0, stream_id=0)
    cuda = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_properties": CARD,
        "get_device_capability": CAPABILITY,
        "is_bf16_supported": True,
        "is_tf32_supported": True,
        "synchronize": None,
        "set_device": None,
        "current_stream": stream,
        "get_rng_state": torch.empty(16, dtype=torch.uint8),
        "set_rng_state": None,
        "_exchange_device": 0,
        "_maybe_exchange_device": 0,
        "_lazy_init": None,
    }
    interface = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_compute_capability": 90,
        "get_device_properties": CARD,
        "synchronize": None,
        "set_device": None,
        "exchange_device": 0,
        "maybe_exchange_device": 0,
        "get_raw_stream": 0,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer(value)))
        for name, value in interface.items():
            stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(answer(value))))
        for name, value in {"get_device_properties": CARD, "current_device": 0}.items():
            stack.enter_context(mock.patch.object(CudaInterface.Worker, name, staticmethod(answer(value))))
        for name, value in {"current_device_index": 0, "current_stream": stream}.items():
            stack.enter_context(mock.patch.object(torch.accelerator, name, answer(value)))
        stack.enter_context(mock.patch.object(torch.random, "fork_rng", answer(contextlib.nullcontext())))
        stack.enter_context(mock.patch.object(torch._subclasses.fake_tensor, "init_gpu_context", answer()))
        stack.enter_context(
            torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False, use_static_triton_launcher=False)
        )
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", answer()))
        _forget_triton()
        stack.callback(_forget_triton)
        drivers = triton.runtime.driver
        before = drivers._active
        drivers.set_active(_Driver())
        stack.callback(setattr, drivers, "_active", before)
        yield


def _forget_triton() -> None:
    """What torch has found out about triton, it keeps."""
    for known in vars(torch.utils._triton).values():
        if hasattr(known, "cache_clear"):
            known.cache_clear()


# --- from our own way into flex to graphs ---


def conversation(case: Case) -> fr.Layout:
    """As many turns as a row holds."""
    h, t, r = case.turn
    n = case.length // (h + t + 2 * r)
    return fr.lay_out_turns([([1] * h, [2] * t, [3] * r)] * n)


Known = dict[int, tuple[Tensor, Tensor]]
"""What a meta tensor stands for, by its id; the tensor itself is kept, so that no other gets its id."""


def on_meta(x: Any, known: Known) -> Any:
    """A tensor, or a function with all tensors it has captured."""
    if isinstance(x, Tensor):
        bare = x.to("meta")
        known[id(bare)] = (bare, x)
        return bare
    if isinstance(x, types.FunctionType) and x.__closure__:
        cells = tuple(types.CellType(on_meta(cell.cell_contents, known)) for cell in x.__closure__)
        return types.FunctionType(x.__code__, x.__globals__, x.__name__, x.__defaults__, cells)
    return x


def visible(case: Case, known: Known) -> BlockMask:
    row = fr.collate([conversation(case)], length=case.length)
    blocks = fr.block_mask(row, block_size=case.block_size, mask=case.mask, **case.limits)
    lists = {name: getattr(blocks, name) for name in LISTS}
    return BlockMask(
        seq_lengths=blocks.seq_lengths,
        BLOCK_SIZE=blocks.BLOCK_SIZE,
        mask_mod=on_meta(blocks.mask_mod, known),
        **{name: on_meta(x, known) for name, x in lists.items()},
    )


def heads(case: Case, n: int, drawn: torch.Generator) -> Tensor:
    """As models make them: a transposed view."""
    return torch.randn(1, case.length, n, case.size, generator=drawn).to(case.dtype).transpose(1, 2)


def inputs(case: Case, drawn: torch.Generator) -> list[Tensor]:
    """Queries, keys, values and, if the layer has any, sinks."""
    found = [heads(case, n, drawn) for n in (case.key_heads * case.group, case.key_heads, case.key_heads)]
    if case.sinks:
        found.append(torch.randn(case.key_heads * case.group, generator=drawn).to(case.dtype))
    return found


class _Traced(Exception):
    """Both graphs are there; there is nothing to run."""


def _any_device(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Traced in place of flex_attention's own check, so it can be no mock."""


@dataclass
class Graphs:
    """What inductor gets of `flex.attend`: graphs and their inputs, forward and backward."""

    ways: dict[str, tuple[torch.fx.GraphModule, list[Any]]] = field(default_factory=dict)
    given: list[Any] = field(default_factory=list)  # what forward would have been called with


def graphs(case: Case, given: list[Tensor]) -> Graphs:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    found = Graphs()
    known: Known = {}

    def forward(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.ways["forward"] = (graph, list(inputs))
        return graph

    def backward(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        found.ways["backward"] = (graph, list(inputs))
        return graph

    lower = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        lower(graph, inputs)

        def run(*args: Any) -> None:
            found.given = [known[id(x)][1] if id(x) in known else x for x in args]
            raise _Traced

        return run

    torch._dynamo.reset()
    attend = torch.compile(flex.attend, backend=backend, fullgraph=True, dynamic=False)
    tensors = [on_meta(x, known).requires_grad_() for x in given]
    with (
        mock.patch.object(torch_flex, "_validate_device", _any_device),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        contextlib.suppress(_Traced),
    ):
        attend(*tensors[:3], visible(case, known), case.size**-0.5, case.softcap, *tensors[3:])
    return found


def on_cuda(graph: torch.fx.GraphModule, inputs: list[Any], mode: Any) -> tuple[torch.fx.GraphModule, list[Any]]:
    def moved(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with mode:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    graph = copy.deepcopy(graph)
    for part in graph.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                if "val" in node.meta:
                    node.meta["val"] = torch.utils._pytree.tree_map(moved, node.meta["val"])
                if "device" in node.kwargs:
                    node.update_kwarg("device", torch.device("cuda", 0))
            part.recompile()
    return graph, [moved(x) for x in inputs]


def with_options(graph: torch.fx.GraphModule, options: dict[str, Any]) -> None:
    """As if the options had been handed to flex_attention as `kernel_options`."""
    for node in graph.graph.nodes:
        if "flex_attention" in str(node.target):
            node.args = tuple(
                {**arg, **options} if isinstance(arg, dict) and "PRESCALE_QK" in arg else arg for arg in node.args
            )


# --- from graphs to machine code ---


def generated(graph: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any], is_backward: bool) -> str:
    """What inductor writes for a graph."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode

    written: list[str] = []

    class Written(Exception):
        pass

    def compile_to_module(self: Any) -> Any:
        code = self.codegen()[0]
        written.append(getattr(code, "value", code))
        raise Written

    mode = FakeTensorMode()
    graph, inputs = on_cuda(graph, inputs, mode)
    with_options(graph, options)
    with (
        mock.patch.object(GraphLowering, "compile_to_module", compile_to_module),
        torch._guards.tracing(torch._guards.TracingContext(mode)),
    ):
        try:
            compile_fx_inner(graph, inputs, is_backward=is_backward)
        except Exception:
            if not written:
                raise
    return written[0]


KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


@contextlib.contextmanager
def interpreter() -> Iterator[None]:
    """Triton's, which takes `int` of an array of one number; numpy from 2.4 on does not."""
    from triton.runtime.interpreter import _LangPatchScope

    set_attr = _LangPatchScope.set_attr

    def corrected(self: Any, owner: Any, name: str, value: Any) -> Any:
        return set_attr(self, owner, name, (lambda x: x.handle.data.item()) if name == "__index__" else value)

    with mock.patch.object(_LangPatchScope, "set_attr", corrected):
        yield


class Interpreted:
    """A kernel that triton's interpreter runs, under the name that generated code calls it by."""

    BLOCK = 32  # elements at once of a kernel that is no template
    TANH = "\n@triton.jit\ndef tanh(x):\n    return 2 * tl.sigmoid(2 * x) - 1\n"  # CUDA's own is machine code

    def __init__(self, name: str, source: str, folder: Path) -> None:
        source = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n@triton\.jit", "@triton.jit", source, flags=re.DOTALL)
        path = folder / f"{name}_{len(list(folder.iterdir()))}.py"
        source = source.replace("triton_helpers.set_driver_to_gpu()", "").replace("libdevice.tanh(", "tanh(")
        path.write_text(source + self.TANH)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        written = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(written)
        self.kernel = getattr(written, name)
        self.is_template = name.startswith("triton_tem")
        self.parameters = [p.split(" ")[0] for p in re.search(rf"def {name}\((.*?)\):", source)[1].split(", ")]

    def run(self, *args: Any, stream: int) -> None:
        if self.is_template:
            self.kernel[args[-3:]](*args[:-3])
        else:
            sizes = dict(zip(self.parameters, args, strict=False))
            grid = [-(-sizes.get(f"{axis}numel", 1) // self.BLOCK) for axis in "xyz"]
            self.kernel[tuple(grid)](*args, **dict.fromkeys(self.parameters[len(args) :], self.BLOCK))


def interpreted(code: str, folder: Path) -> Callable[[list[Any]], Any]:
    """The function that a generated module would have run on a card, on CPU tensors."""
    kernels = types.SimpleNamespace(
        triton=lambda name, source, device_str: Interpreted(name, source, folder), wait=lambda names: None
    )
    for there, here in {
        "async_compile = AsyncCompile()": "",
        "with torch.cuda._DeviceGuard(0):": "if True:",
        "torch.cuda.set_device(0)": "pass",
        "empty_strided_cuda(": "empty_strided_cpu(",
        "get_raw_stream(0)": "0",
    }.items():
        code = code.replace(there, here)
    names: dict[str, Any] = {"async_compile": kernels, "__name__": "generated"}
    exec(compile(code, "generated", "exec"), names)
    return names["call"]


def errors(case: Case) -> dict[str, list[float]]:
    """Of output and gradients, and those of dense attention in the same precision: relative L2."""
    drawn = torch.Generator().manual_seed(0)
    given = inputs(case, drawn)
    row = fr.collate([conversation(case)], length=case.length)
    rule = fr.dense_mask(row, mask=case.mask, **case.limits)
    upstream = torch.randn(1, case.length, given[0].shape[1], case.size, generator=drawn).to(case.dtype)

    def by_dense(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        out = dense.attend(*leaves[:3], rule, case.size**-0.5, case.softcap, *leaves[3:])
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    def off(found: list[Tensor]) -> list[float]:
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]

    exact = by_dense(torch.float64)
    traced = graphs(case, given)
    with tempfile.TemporaryDirectory() as folder:
        with pretended_card():
            code = {way: generated(*traced.ways[way], case.options, way == "backward") for way in traced.ways}
        out, *kept = interpreted(code["forward"], Path(folder))(list(traced.given))
        like = traced.ways["backward"][1][-1]
        arrived = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(upstream)
        grads = interpreted(code["backward"], Path(folder))([*kept, arrived])
    of_inputs = [grads[next(i for i, x in enumerate(traced.given) if x is leaf)] for leaf in given]
    return {"found": off([out, *of_inputs]), "dense": off(by_dense(case.dtype))}


CASES = [
    Case("interval"),
    Case("turn_role", mask="turn_role"),
    Case("window", limits={"window": 32}),
    Case("chunk", limits={"chunk": 32}),
    Case("softcap", softcap=30.0),
    Case("sinks", sinks=True),
    Case("sinks, window", sinks=True, limits={"window": 32}),
    Case("14 over 2 heads", key_heads=2, group=7),
    Case("heads of 128", size=128),
    Case("blocks (128, 256)", block_size=(128, 256)),
    Case("fp32", dtype=torch.float32),
    # Not a number: rows of branches see nothing in the first tile of their list, whatever they see later.
    Case("ROWS_GUARANTEED_SAFE", options={"ROWS_GUARANTEED_SAFE": True}),
]


def main(names: list[str]) -> None:
    torch.set_float32_matmul_precision("highest")
    with interpreter():
        for case in CASES:
            if not names or case.name in names:
                print(json.dumps({"case": case.name, **errors(case)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
