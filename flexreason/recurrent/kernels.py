"""Kernels that are known to be wrong where states are forked, by their versions.

A model's functions are kernels where transformers found their packages installed. Ours hand them what they take (states
to begin from, a batch of pieces), so what counts is whether they give what they say, with gradients.
"""

import importlib.metadata
import importlib.util
import re

import torch

DELTA_RULES = {"torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention"}


def reason_against_kernels(called: set[str], from_hub: bool) -> tuple[str, str] | None:
    """What speaks against the kernels behind the functions that a model's layers call, and what can be done.

    Args:
        called: names of these functions.
        from_hub: whether the model was told to take its kernels from the hub.
    """
    if from_hub:
        return (
            "its recurrent layers come from the hub's kernels (use_kernels=True), of which some are whole layers that "
            "take no tree, in versions that nobody has tried",
            "load it with use_kernels=False",
        )
    if not called & DELTA_RULES or importlib.util.find_spec("fla") is None:
        return None
    fla = version_of("flash-linear-attention") or version_of("fla-core")
    if fla is None:
        return (
            "its delta rule is computed by the package fla, which says no version",
            "install flash-linear-attention 0.6.0 or later",
        )
    if fla < (0, 6, 0):
        return (
            f"its delta rule is computed by flash-linear-attention {said(fla)}, and before 0.6.0 gradients of states "
            "were lost in short pieces",
            "install 0.6.0 or later",
        )
    triton = version_of("triton")
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    if hopper and triton is not None and (3, 4, 0) <= triton <= (3, 7, 1):
        return (
            f"its delta rule is computed by triton {said(triton)}, whose backward of it fails on Hopper from 3.4.0 to "
            "3.7.1",
            "install triton 3.7.2 or later, or uninstall flash-linear-attention",
        )
    return None


def version_of(package: str) -> tuple[int, ...] | None:
    """The first three numbers of an installed version, or None."""
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def said(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
