"""FlashAttention 4's block-sparse kernels with our rule, compiled for capability 9.0 on a machine without a card.

    python benchmarks/card/compile_fa4.py

Run under flash-attn-4 4.0.0b9, nvidia-cutlass-dsl 4.4.2, quack-kernels 0.3.7 and apache-tvm-ffi 0.1.9, with a build of
torch for CUDA. The first compile of a process fails a check of the driver; the next pass.
"""

# ruff: noqa: E402

import os
import time
from typing import Any

os.environ["FLASH_ATTENTION_ARCH"], os.environ["CUTE_DSL_ARCH"] = "sm_90", "sm_90a"  # read when it is imported

import cutlass
import torch
from cutlass import cute
from flash_attn.cute import interface
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from torch._subclasses.fake_tensor import FakeTensorMode

S, H, G, D = 4096, 32, 8, 128


@cute.jit
def visible(b: Any, h: Any, q: Any, kv: Any, seqlen_info: Any, aux: Any) -> Any:
    """kv <= q < until[kv]"""
    place, ends = cute.make_rmem_tensor(1, cutlass.Int32), cute.make_rmem_tensor(1, cutlass.Int32)
    place.store(kv)
    ends[0] = aux[0][place[0]]
    return (kv <= q) & (q < ends.load())


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def lists() -> Any:
    n = S // 128
    parts = [empty(1, 1, n, *rest, dtype=torch.int32) for rest in ((), (n,), (), (n,))]
    return BlockSparseTensorsTorch(*parts, block_size=(128, 128))


def attempt(name: str, call: Any) -> Any:
    start = time.time()
    try:
        found = call()
        print(f"{name}: compiled in {time.time() - start:.1f} s", flush=True)
        return found
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
        return None


def main() -> None:
    with FakeTensorMode():
        q, k, v = empty(1, S, H, D), empty(1, S, G, D), empty(1, S, G, D)
        until = empty(S, dtype=torch.int32)
        ours = {"mask_mod": visible, "aux_tensors": [until], "block_sparse_tensors": lists()}
        for name, options in (("causal", {"causal": True}), ("our rule, block sparse", ours)):
            options["softmax_scale"] = 0.1
            forward = lambda o=options: interface._flash_attn_fwd(q, k, v, return_lse=True, **o)[:2]  # noqa: E731
            if found := attempt(f"{name}, forward", forward):
                out, lse = found
                backward = lambda o=options: interface._flash_attn_bwd(q, k, v, out, empty(1, S, H, D), lse, **o)  # noqa: B023, E731
                attempt(f"{name}, backward", backward)


if __name__ == "__main__":
    main()
