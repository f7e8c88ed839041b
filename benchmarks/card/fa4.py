"""FlashAttention 4 on Hopper (flash-attn-4, carried): our rule in flex's FLASH backend, segments and packed samples.

    python benchmarks/card/fa4.py
    python benchmarks/card/fa4.py --device cpu --small     # a rehearsal: what needs no card

`compile_fa4.py` shows what of it compiles, without a card. The carried folder is made of the wheels of flash-attn-4,
nvidia-cutlass-dsl, nvidia-cutlass-dsl-libs-base, quack-kernels, apache-tvm-ffi and torch-c-dlpack-ext, without their
dependencies, unzipped into one folder: `tar | xz -3 -T2`, 58 MiB. Builds before 6 August 2026 can be wrong in backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

import attention
from attention import CELLS, SMALL, Bench, Way, rows_of
from flexreason.attention import flash as our_flash
from shared import Run


class Plain(torch.autograd.Function):
    """Packed samples with no window said: torch 2.11's varlen_attn says (-1, 0), which FA4's backward refuses."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, begins: Tensor) -> Tensor:
        longest = int(begins.diff().max())
        ctx.rest = begins, begins, longest, longest, 0.0, True
        scale = q.shape[-1] ** -0.5
        out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *ctx.rest, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        none = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        given = grads[0], q, k, v, out, lse, *ctx.rest, *none
        return *torch.ops.aten._flash_attention_backward(*given, scale=q.shape[-1] ** -0.5), None


def packed_fa4(bench: Bench) -> Way:
    way = bench.packed_flash()
    right = torch.autograd.grad(way.forward(), way.inputs, way.upstream)
    activate_flash_attention_impl("FA4")
    way.forward = lambda: Plain.apply(*way.inputs, bench.packed.begins)
    found = torch.autograd.grad(way.forward(), way.inputs, way.upstream)
    way.figures["error"] = max(attention.relative_l2([a], [b]) for a, b in zip(found, right, strict=True))
    if not way.figures["error"] < attention.WRONG[bench.dtype]:
        raise ArithmeticError(f"off by {way.figures['error']:.2g}")
    return way


def segments_fa4(bench: Bench) -> Way:
    our_flash._fault.cache_clear()  # so that the kernels are asked anew whether they compute what is meant
    return bench.segments()


def cell(bench: Bench, repeats: int) -> dict[str, Any]:
    """FA4 is active for as long as its ways are made and timed; each table has packed samples of its own."""
    on_card = bench.device.type == "cuda"
    makers = {"packed": bench.packed_flash, "flex, triton": bench.flex, "segments": bench.segments}
    if on_card:
        makers["flex, FLASH"] = lambda: bench.rung({"kernel_options": {"BACKEND": "FLASH"}})
    rows = rows_of(bench, makers, repeats)
    if on_card:
        try:
            four = {"packed": lambda: packed_fa4(bench), "segments": lambda: segments_fa4(bench)}
            rows += [{**row, "way": f"{row['way']}, FA4"} for row in rows_of(bench, four, repeats)]
        finally:
            restore_flash_attention_impl()
    return {"ways": rows}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    run = Run(__file__, __doc__, repeats=3)
    run.option("--small", action="store_true", help="a rehearsal")
    options = run.start(arguments)
    one = SMALL[0] if options.small else CELLS[0]
    found = run.cell({"cell": one.name}, lambda: cell(Bench(one, run.device), options.repeats))
    run.table(one.name, found.get("ways", [found]), hidden=["pairs"])
    return run.finish(cells=[found])


if __name__ == "__main__":
    torch._functorch.config.donated_buffer = False
    main()
