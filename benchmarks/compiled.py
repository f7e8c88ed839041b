"""What FlexAttention compiles to for an H100 or H200, read from its machine code: without a card, and without times.

    python benchmarks/compiled.py                  # every code path of our flex backend, forward and backward
    python benchmarks/compiled.py --addresses      # rows whose tensors pass 2^31 elements
    python benchmarks/compiled.py --parts          # what an option or a mask costs in instructions a tile
    python benchmarks/compiled.py --sweep          # kernel options, by promise; writes benchmarks/ladder.json
    python benchmarks/compiled.py --check          # what the same kernels compute, run by triton's interpreter on CPU

It needs a CUDA build of torch, with triton, and nothing of a GPU: one that is there is not used. `attend` of the flex
backend is traced on meta tensors, its graphs are relabelled as CUDA ones and lowered by inductor for compute capability
9.0, and the kernels are compiled to machine code by triton with inductor's own arguments. The rest is read there:

registers  a thread; *stack* is what did not fit into them, in bytes
blocks     thread blocks that a multiprocessor holds at once, by registers (64 Ki), shared memory (228 KiB), threads
index      what indices in tables are counted in; *offsets*, what offsets of rows in loops are, and how far those reach
           at most, in 2^31 elements: int32 and more than 1 is a wrong address. TMA has no such offsets
HGMMA      matrix instructions of a warp group (wgmma); HMMA those of a warp, which reach half the rate at most
spills     loads and stores of what did not fit (LDL, STL); *async* are copies to shared memory that nobody waits for
           at once (LDGSTS, UTMALDG): without them in a loop, every tile waits for memory
a tile     instructions of a warp for one tile of a loop: forward's partial and full blocks; backward's dQ and dK/dV

Nothing here says how fast a kernel is. What spills or has no HGMMA is slow; the rest is for a clock to decide.
"""

import argparse
import contextlib
import copy
import importlib.util
import json
import logging
import os
import pprint
import re
import subprocess
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import flexreason as fr
from flexreason.attention import dense, flex
from flexreason.tree.blocks import BLOCK
from measure import print_json, print_table

CAPABILITY = (9, 0)
MULTIPROCESSOR = {"registers": 2**16, "shared": 228 * 1024, "threads": 2048, "blocks": 32}
SHARED_A_BLOCK = 227 * 1024
RESERVED = 1024
"""Shared memory that the driver keeps of every block."""

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

WAYS = ("forward", "backward")

ACCUMULATORS = 192
"""Registers of a thread that sums of a tile may take; with more of 255 in them, nothing else fits."""

RUNGS = 10

WINDOW = 512

LISTS = [f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")]
"""The eight lists of a BlockMask."""


@dataclass(frozen=True)
class Case:
    """One way into flex: a layer and a row."""

    name: str
    size: int = 128
    key_heads: int = 2
    group: int = 4
    dtype: torch.dtype = torch.bfloat16
    mask: str = "interval"
    limits: dict[str, int] = field(default_factory=dict)
    softcap: float | None = None
    sinks: bool = False
    block_size: int | tuple[int, int] = BLOCK
    length: int = 4096
    turn: tuple[int, int, int] = (64, 256, 64)  # tokens of h, t and r
    heads_first: bool = False  # [1, H, S, D] as it is stored, and not a view of [1, S, H, D]
    wide_lists: bool = False  # in int64
    rule: Callable[[dict[str, Tensor]], Any] | None = None  # in place of the package's own
    capped: Callable[[float], Any] | None = None  # likewise
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
    if case.wide_lists:
        lists = {name: x.long() for name, x in lists.items()}
    rule = case.rule(row) if case.rule else blocks.mask_mod
    return BlockMask(
        seq_lengths=blocks.seq_lengths,
        BLOCK_SIZE=blocks.BLOCK_SIZE,
        mask_mod=on_meta(rule, known),
        **{name: on_meta(x, known) for name, x in lists.items()},
    )


def heads(case: Case, n: int, drawn: torch.Generator | None) -> Tensor:
    """As models make them: a transposed view."""
    shape = (n, case.length) if case.heads_first else (case.length, n)
    device = "cpu" if drawn else "meta"
    x = torch.empty(1, *shape, case.size, dtype=case.dtype, device=device)
    if drawn:
        x = torch.randn(x.shape, generator=drawn).to(case.dtype)
    return x if case.heads_first else x.transpose(1, 2)


def inputs(case: Case, drawn: torch.Generator | None = None) -> list[Tensor]:
    """Queries, keys, values and, if the layer has any, sinks; without contents unless there is a generator."""
    found = [heads(case, n, drawn) for n in (case.key_heads * case.group, case.key_heads, case.key_heads)]
    if case.sinks:
        n = case.key_heads * case.group
        bare = torch.empty(n, dtype=case.dtype, device="meta")
        found.append(torch.randn(n, generator=drawn).to(case.dtype) if drawn else bare)
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


def graphs(case: Case, given: list[Tensor] | None = None) -> Graphs:
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
    tensors = [on_meta(x, known).requires_grad_() for x in given or inputs(case)]
    with (
        mock.patch.object(torch_flex, "_validate_device", _any_device),
        mock.patch.object(flex, "_capped", case.capped or flex._capped),
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


@dataclass
class Kernel:
    """One kernel for attention, compiled."""

    source: str
    tile: str
    warps: int
    stages: int
    registers: int
    stack: int
    shared: int
    counts: Counter[str]
    loops: list[Counter[str]]
    address_bits: int
    offset_bits: set[int]
    furthest: float
    ptx: str

    @property
    def blocks(self) -> int:
        """Blocks on one multiprocessor: registers are given to a warp in units of 256."""
        threads = 32 * self.warps
        return min(
            MULTIPROCESSOR["registers"] // (-(-self.registers // 8) * 8 * threads),
            MULTIPROCESSOR["shared"] // (self.shared + RESERVED) if self.shared <= SHARED_A_BLOCK else 0,
            MULTIPROCESSOR["threads"] // threads,
            MULTIPROCESSOR["blocks"],
        )

    def row(self) -> dict[str, Any]:
        return {
            "tile": self.tile,
            "warps": self.warps,
            "stages": self.stages,
            "registers": self.registers,
            "stack": self.stack,
            "shared KiB": round(self.shared / 1024),
            "blocks": self.blocks,
            "HGMMA": self.counts["HGMMA"],
            "HMMA": self.counts["HMMA"],
            "spills": self.counts["LDL"] + self.counts["STL"],
            "async": self.counts["LDGSTS"] + self.counts["UTMALDG"],
            "a tile": " ".join(str(loop.total()) for loop in self.loops),
            "index": f"int{self.address_bits}",
            "offsets": "/".join(f"int{bits}" for bits in sorted(self.offset_bits)),
            "furthest": self.furthest,
        }


def compiled(code: str) -> Kernel:
    """The attention kernel of a generated module, in machine code."""
    from torch._inductor.codecache import PyCodeCache

    ((name, source),) = [found for found in KERNEL.findall(code) if found[0].startswith("triton_tem")]
    written = PyCodeCache.load(source)
    tuner = getattr(written, name)
    ((config,),) = [tuner.configs]
    made = tuner._precompile_config(config).kernel
    metadata = made.metadata
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made.asm["cubin"])
        cubin.flush()
        usage = cuda_tool("cuobjdump", "--dump-resource-usage", cubin.name)
        listing = cuda_tool("cuobjdump", "-sass", cubin.name)
    constants = dict(re.findall(r"^    (\w+) : tl\.constexpr = (\w+)$", source, re.MULTILINE))
    instructions = disassembled(listing)
    return Kernel(
        source=source,
        tile="x".join(constants[n] for n in ("BLOCK_M", "BLOCK_N", "BLOCK_M1", "BLOCK_N1") if n in constants)
        + (f" {constants['BLOCK_M2']}x{constants['BLOCK_N2']}" if "BLOCK_M2" in constants else ""),
        warps=metadata.num_warps,
        stages=metadata.num_stages,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=metadata.shared,
        counts=Counter(opcode for _, opcode, _ in instructions),
        loops=loops(instructions),
        address_bits=64 if "INDEX_DTYPE : tl.constexpr = tl.int64" in source else 32,
        offset_bits=offset_bits(made.asm["ttir"]),
        furthest=furthest(source),
        ptx=made.asm["ptx"],
    )


def offset_bits(ttir: str) -> set[int]:
    """In how many bits loops count to the rows of queries, keys and values."""
    found: set[int] = set()
    depth = 0
    for line in ttir.splitlines():
        if "scf.for" in line or depth:
            depth += line.count("{") - line.count("}")
        if depth and "tt.addptr" in line:
            offsets = re.findall(r"tensor<\d+x\d+x!tt\.ptr<b?f\d+>>, tensor<\d+x\d+xi(\d+)>", line)
            found.update(map(int, offsets))
    return found


def furthest(source: str) -> float:
    """How far these rows lie apart at most, in 2^31 elements: beyond 1, 32 bits are too few."""
    step = dict(re.findall(r"^    stride_(q|k|v|do)z, .* = .*, (\d+), 1$", source, re.MULTILINE))
    if "do" not in step:  # forward's loops are over keys
        del step["q"]
    length = re.search(r"^    KV_LEN = (\d+)$", source, re.MULTILINE)
    return max(map(int, step.values())) * int(length[1]) / 2**31


def cuda_tool(name: str, *args: str) -> str:
    """Of those that come with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], check=True, capture_output=True, text=True).stdout


def disassembled(listing: str) -> list[tuple[int, str, str]]:
    """Address, opcode without modifiers, and the whole line, of every instruction."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)[^;]*);", re.MULTILINE)
    return [(int(address, 16), opcode, line) for address, line, opcode in pattern.findall(listing)]


def loops(instructions: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """The innermost loops that multiply matrices, in the order of the code."""
    spans = []
    for address, opcode, line in instructions:
        target = re.search(r"0x([0-9a-f]+)\s*$", line)
        if opcode == "BRA" and target and int(target[1], 16) < address:
            spans.append((int(target[1], 16), address))
    found = []
    for start, end in sorted(spans):
        inside = [line for line in instructions if start <= line[0] <= end]
        if any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans):
            continue
        counts = Counter(opcode for _, opcode, _ in inside)
        if counts["HGMMA"] or counts["HMMA"] or counts["FFMA"] > 100:
            found.append(counts)
    return found


# --- without machine code: the same kernels, interpreted ---


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


def checked(case: Case, start: float) -> dict[str, Any]:
    """Output and gradients of the generated code against the dense backend in fp64: relative L2."""
    drawn = torch.Generator().manual_seed(0)
    given = inputs(case, drawn)
    row = fr.collate([conversation(case)], length=case.length)
    rule = fr.dense_mask(row, mask=case.mask, **case.limits)
    upstream = torch.randn(1, case.length, given[0].shape[1], case.size, generator=drawn).to(case.dtype)

    def by_dense(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in given]
        out = dense.attend(*leaves[:3], rule, case.size**-0.5, case.softcap, *leaves[3:])
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    def errors(found: list[Tensor]) -> list[float]:
        return [float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)]

    exact = by_dense(torch.float64)
    row = {"case": case.name}
    try:
        traced = graphs(case, given)
        with tempfile.TemporaryDirectory() as folder:
            with pretended_card():
                code = {way: generated(*traced.ways[way], case.options, way == "backward") for way in WAYS}
            out, *kept = interpreted(code["forward"], Path(folder))(list(traced.given))
            like = traced.ways["backward"][1][-1]
            arrived = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(upstream)
            grads = interpreted(code["backward"], Path(folder))([*kept, arrived])
        of_inputs = [grads[next(i for i, x in enumerate(traced.given) if x is leaf)] for leaf in given]
        for name, error, own in zip(
            ("out", "dq", "dk", "dv", "sinks"), errors([out, *of_inputs]), errors(by_dense(case.dtype)), strict=False
        ):
            row |= {name: error, f"{name}, dense": own}
    except Exception as error:
        row["error"] = short(error)
    print(f"{time.perf_counter() - start:6.0f} s  {row}", file=sys.stderr, flush=True)
    return row


def small() -> list[Case]:
    """Code paths at a size that an interpreter can run."""
    # Turns that make full blocks too. The interpreter takes bf16 for integers; fp16 has the same tiles.
    shape = {"size": 64, "key_heads": 1, "group": 2, "length": 384, "turn": (64, 16, 16), "dtype": torch.float16}
    return [
        Case("interval", **shape),
        Case("turn_role", **shape, mask="turn_role"),
        Case("window", **shape, limits={"window": 32}),
        Case("chunk", **shape, limits={"chunk": 32}),
        Case("softcap", **shape, softcap=30.0),
        Case("sinks", **shape, sinks=True),
        Case("sinks, window", **shape, sinks=True, limits={"window": 32}),
        Case("14 over 2 heads", **shape | {"key_heads": 2, "group": 7}),
        Case("heads of 128", **shape | {"size": 128}),
        Case("blocks (128, 256)", **shape, block_size=(128, 256)),
        Case("fp32", **shape | {"dtype": torch.float32}),
        Case("PRESCALE_QK", **shape, options={"PRESCALE_QK": True}),
        Case("USE_TMA", **shape, options={"USE_TMA": True}),
        # Not a number: rows of branches see nothing in the first tile of their list, whatever they see later.
        Case("ROWS_GUARANTEED_SAFE", **shape, options={"ROWS_GUARANTEED_SAFE": True}),
    ]


# --- tables ---


def tried(case: Case, start: float) -> list[dict[str, Any]]:
    """A row of a table for each way, said at once; what fails is in it by its error."""
    rows = []
    traced: Graphs | Exception
    try:
        traced = graphs(case)
    except Exception as error:
        traced = error
    for way in WAYS:
        kernel = {"error": short(traced)} if isinstance(traced, Exception) else built(traced, way, case.options)
        rows.append({"case": case.name, "way": way} | (kernel.row() if isinstance(kernel, Kernel) else kernel))
        say(rows[-1], start)
    return rows


def built(traced: Graphs, way: str, options: dict[str, Any]) -> Kernel | dict[str, str]:
    from torch._inductor.utils import fresh_cache

    logged = logging.getLogger("torch._inductor")
    before = logged.level
    logged.setLevel(logging.CRITICAL)  # a kernel that does not compile is a row of the table
    try:
        with tempfile.TemporaryDirectory() as folder, pretended_card(), fresh_cache(dir=folder):
            return compiled(generated(*traced.ways[way], options, way == "backward"))
    except Exception as error:
        return {"error": short(error)}
    finally:
        logged.setLevel(before)


def short(error: BaseException) -> str:
    while type(error).__name__ == "CompilationError" and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # triton's own says where, its cause what
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].removeprefix('LoweringException: ')}"[:150]


def say(row: dict[str, Any], start: float) -> None:
    found = row.get("error") or ", ".join(f"{name} {row[name]}" for name in ("registers", "stack", "blocks", "a tile"))
    print(f"{time.perf_counter() - start:6.0f} s  {row['case']}, {row['way']}: {found}", file=sys.stderr, flush=True)


def code_paths() -> list[Case]:
    return [
        Case("interval"),
        Case("turn_role", mask="turn_role"),
        Case("window", limits={"window": WINDOW}),
        Case("chunk", limits={"chunk": WINDOW}),
        Case("softcap", softcap=30.0),
        Case("softcap, window", softcap=30.0, limits={"window": WINDOW}),
        Case("sinks", size=64, group=8, sinks=True),
        Case("sinks, window", size=64, group=8, sinks=True, limits={"window": 128}),
        *(Case(f"heads of {size}", size=size) for size in (64, 96, 192, 256)),
        *(Case(f"{2 * group} over 2 heads", group=group) for group in (1, 2, 4, 7, 8)),
        *(Case(f"blocks {size}", block_size=size) for size in (64, (128, 64), (64, 128), (256, 128), (128, 256), 256)),
        *(Case(f"fp32, heads of {size}", size=size, dtype=torch.float32) for size in (64, 128)),
        Case("fp16", dtype=torch.float16),
    ]


def sweep(sizes: list[int], start: float, ladder: Path) -> None:
    """The kernel options worth a card's time: all of a grid compiled, the promising first."""
    rows, cells = [], []
    for size in sizes:
        found = {way: swept(size, way, start) for way in WAYS}
        rows += [row for way in WAYS for row in found[way]]
        cells += rungs(size, *(found[way] for way in WAYS))
    ladder.write_text("[\n" + ",\n".join(f"  {json.dumps(cell)}" for cell in cells) + "\n]\n")
    hidden = ("kernel_options", "block_size", "rank", "offsets", "furthest", "index", "tile", "warps", "stages")
    print_table("kernel options, by promise", [{k: v for k, v in row.items() if k not in hidden} for row in rows])
    print(f"\nthe same as {ladder.name}\n\n{pprint.pformat(cells, width=200, sort_dicts=False)}")
    print_json(benchmark="compiled", ladder=rows)


def swept(size: int, way: str, start: float) -> list[dict[str, Any]]:
    traced: dict[int, Graphs] = {}
    rows = []
    for options in forward_grid(size) if way == "forward" else backward_grid(size):
        block = max(BLOCK, options.get("fwd_BLOCK_M", 0))
        if block not in traced:
            traced[block] = graphs(Case("interval", size=size, block_size=(block, BLOCK)))
        kernel = built(traced[block], way, options)
        row = {"case": f"{size}: {named(options)}", "way": way}
        row |= promise(kernel, size) if isinstance(kernel, Kernel) else kernel
        say(row, start)
        rows.append(row | {"block_size": [block, BLOCK], "kernel_options": options})
    return sorted(rows, key=lambda row: row.get("rank", (9,)))


def forward_grid(size: int) -> list[dict[str, Any]]:
    """H100's own defaults are in it: 128x64, 8 warps, 3 stages for heads of 128; 128x128, 4 warps, 3 for 64."""
    return [
        {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages, "fwd_USE_TMA": tma}
        for m, n, warps, stages, tma in product((64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (False, True))
        if m * (size + n) <= ACCUMULATORS * 32 * warps
    ]


def backward_grid(size: int) -> list[dict[str, Any]]:
    """H100's own default is in it: 64x128 and 128x64, 8 warps, 3 stages for both head sizes."""
    return [
        {
            "bwd_BLOCK_M1": m1,
            "bwd_BLOCK_N1": n1,
            "bwd_BLOCK_M2": n1,
            "bwd_BLOCK_N2": n2,
            "bwd_num_warps": warps,
            "bwd_num_stages": stages,
        }
        for n1, m1, n2, warps, stages in product(
            (32, 64) if size > 128 else (64, 128), (32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3)
        )
        if max(m1, n2) <= n1 and n1 * (2 * size + m1) <= ACCUMULATORS * 32 * warps
    ]


def named(options: dict[str, Any]) -> str:
    """Short: tiles, warps, stages, flags."""
    o = {name.removeprefix("fwd_").removeprefix("bwd_"): value for name, value in options.items()}
    tiles = [
        f"{o[m]}x{o[n]}"
        for m, n in (("BLOCK_M", "BLOCK_N"), ("BLOCK_M1", "BLOCK_N1"), ("BLOCK_M2", "BLOCK_N2"))
        if m in o
    ]
    flags = [name for name, value in o.items() if value is True]
    return " ".join([*tiles, f"{o['num_warps']} warps", f"{o['num_stages']} stages", *flags])


def promise(kernel: Kernel, size: int) -> dict[str, Any]:
    """A kernel's row and its rank: no spills in loops, wgmma, asynchronous copies, 8 warps, few instructions."""
    total = sum(kernel.loops, Counter())
    tiles = [int(x) for x in re.findall(r"\d+", kernel.tile)]
    pairs = [m * n for m, n in zip(tiles[::2], tiles[1::2], strict=True)]
    # Two loops a tile: partial blocks and full ones. Instructions of all warps for 1000 pairs of each.
    slots = sum(
        1000 * loop.total() * kernel.warps / (2 * pairs[i * len(pairs) // len(kernel.loops)])
        for i, loop in enumerate(kernel.loops)
    )
    spilled = total["LDL"] + total["STL"]
    asynchronous = total["LDGSTS"] + total["UTMALDG"]
    resident = kernel.blocks * kernel.warps
    # A loop for each kind of block is there whenever a kernel was read right.
    read = len(kernel.loops) == 2 * len(pairs)
    rank = (not read, not kernel.blocks, spilled > 16, not total["HGMMA"], not asynchronous, resident < 8, slots)
    return kernel.row() | {"in loops": spilled, "resident warps": resident, "slots": slots, "rank": rank}


def rungs(size: int, forward: list[dict[str, Any]], backward: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A ladder's cells for one head size: flex's own choice, the best tiles, then flags and lists on the best.

    Forward and backward are kernels of their own, so a cell tries one of each.
    """

    def cell(name: str, block_size: list[int], options: dict[str, Any]) -> dict[str, Any]:
        return {"name": f"{size}: {name}", "head_size": size, "block_size": block_size, "kernel_options": options}

    def best(rows: list[dict[str, Any]], tma: bool = False) -> list[dict[str, Any]]:
        usable = [row for row in rows if "rank" in row and not any(row["rank"][:2])]
        return [row for row in usable if row["kernel_options"].get("fwd_USE_TMA", False) == tma][:RUNGS]

    def both(f: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        name = " | ".join(named(x["kernel_options"]) for x in (f, b))
        return cell(name, f["block_size"], f["kernel_options"] | b["kernel_options"])

    pairs = list(zip(best(forward), best(backward), strict=False))
    tiles = [both(f, b) for f, b in pairs]
    options, blocks = tiles[0]["kernel_options"], tiles[0]["block_size"]
    return [
        cell("default", [BLOCK, BLOCK], {}),
        *tiles,
        *(both(f, b) for f, (_, b) in zip(best(forward, tma=True)[:2], pairs, strict=False)),
        cell("best, PRESCALE_QK", blocks, options | {"PRESCALE_QK": True}),
        cell("best, backward with TMA", blocks, options | {"bwd_USE_TMA": True}),
        *(
            cell(f"best, lists of {q}, {kv}", [q, kv], options)
            for q, kv in ((256, 128), (128, 256), (256, 256))
            if q >= blocks[0] and [q, kv] != blocks
        ),
    ]


def addresses() -> list[Case]:
    """Rows in which 32 bits do not suffice to count to the last element of a tensor."""
    far = {"length": 5 * 2**17, "group": 1, "key_heads": 32}
    return [
        Case("32 over 32 heads", **far),
        Case("32 over 8 heads", **far | {"group": 4, "key_heads": 8}),
        Case("32 over 8 heads, half as long", **far | {"group": 4, "key_heads": 8, "length": 5 * 2**16}),
        Case("32 over 32 heads, lists in int64", **far, wide_lists=True),
        Case("32 over 32 heads, heads first", **far, heads_first=True),
        Case("32 over 32 heads, USE_TMA", **far, options={"USE_TMA": True}),
    ]


def parts() -> list[Case]:
    """Masks, caps and options that could be otherwise: what they cost in instructions a tile."""

    def causal(row: dict[str, Tensor]) -> Any:
        return lambda b, h, q, kv: kv <= q

    def ended(row: dict[str, Tensor]) -> Any:
        until = row["until"][0].int()
        return lambda b, h, q, kv: q < until[kv]

    def unsigned(row: dict[str, Tensor]) -> Any:
        until = row["until"][0].int()
        return lambda b, h, q, kv: (q - kv).view(torch.uint32) < (until[kv] - kv).view(torch.uint32)

    def clamped(row: dict[str, Tensor]) -> Any:
        last = row["until"][0].int() - 1
        return lambda b, h, q, kv: torch.minimum(torch.maximum(q, kv), last[kv]) == q

    def window(row: dict[str, Tensor]) -> Any:
        until, position = (row[name][0].int() for name in ("until", "position_ids"))
        return lambda b, h, q, kv: (kv <= q) & (q < until[kv]) & (position[q] - position[kv] < WINDOW)

    def chunk(row: dict[str, Tensor]) -> Any:
        until, position = (row[name][0].int() for name in ("until", "position_ids"))
        return lambda b, h, q, kv: (kv <= q) & (q < until[kv]) & (position[q] // WINDOW == position[kv] // WINDOW)

    def by_tanh(cap: float) -> Any:
        return lambda score, b, h, q, kv: cap * torch.tanh(score / cap)

    flags = ("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "USE_TMA")
    return [
        Case("interval"),
        Case("interval, one unsigned comparison", rule=unsigned),
        Case("interval, clamped", rule=clamped),
        Case("kv <= q alone", rule=causal),
        Case("q < until[kv] alone", rule=ended),
        Case("window", limits={"window": WINDOW}),
        Case("window, subtracted a pair", limits={"window": WINDOW}, rule=window),
        Case("chunk", limits={"chunk": WINDOW}),
        Case("chunk, divided a pair", limits={"chunk": WINDOW}, rule=chunk),
        Case("softcap", softcap=30.0),
        Case("softcap by a tanh", softcap=30.0, capped=by_tanh),
        *(Case(f"interval, {flag}", options={flag: True}) for flag in flags),
        Case("interval, WRITE_DQ off", options={"WRITE_DQ": False}),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--addresses", action="store_true", help="rows whose tensors pass 2^31 elements")
    which.add_argument("--parts", action="store_true", help="what an option or a mask costs in instructions")
    which.add_argument("--check", action="store_true", help="what the kernels compute, run by triton's interpreter")
    which.add_argument("--sweep", action="store_true", help="kernel options by promise, into a ladder")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 64], help="head sizes of --sweep")
    parser.add_argument("--ladder", type=Path, default=Path(__file__).with_name("ladder.json"))
    parser.add_argument("--only", nargs="+", help="cases by name")
    options = parser.parse_args()
    if not torch.version.cuda or importlib.util.find_spec("triton") is None:
        parser.exit(1, "expected a CUDA build of torch and triton: pip install torch, without a CPU index\n")
    if options.check and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"  # which triton reads when it is imported
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_float32_matmul_precision("highest")
    start = time.perf_counter()
    if options.check:
        with interpreter():
            rows = [checked(case, start) for case in small() if not options.only or case.name in options.only]
        print_table("what the generated kernels compute, interpreted: relative errors", rows)
        return print_json(benchmark="compiled", table="check", rows=rows)
    if options.sweep:
        return sweep(options.sizes, start, options.ladder)
    title, cases = "what the code paths of the flex backend compile to", code_paths()
    if options.addresses:
        title, cases = "rows whose tensors pass 2^31 elements", addresses()
    if options.parts:
        title, cases = "what a part costs", parts()
    rows = [row for case in cases if not options.only or case.name in options.only for row in tried(case, start)]
    hidden = () if options.addresses else ("index", "offsets", "furthest")
    print_table(title, [{name: x for name, x in row.items() if name not in hidden} for row in rows])
    return print_json(benchmark="compiled", table=title, rows=rows)


if __name__ == "__main__":
    main()
