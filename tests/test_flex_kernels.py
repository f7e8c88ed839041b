"""What flex compiles to on a GPU computes what it should, backward included, as far as a CPU can tell."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(
    torch.version.cuda is None or importlib.util.find_spec("triton") is None,
    reason="expected a build of torch for CUDA, with triton (pip install torch); a GPU is not needed",
)
def test_generated_kernels_compute_what_dense_attention_does():
    """In a process of its own, since triton is told that it interprets before it is imported."""
    script = Path(__file__).with_name("interpreting.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}
    wrong = rows.pop("ROWS_GUARANTEED_SAFE")  # why that option is not among our settings
    assert any(error != error for error in wrong["found"])
    assert len(rows) == 11
    for name, row in rows.items():
        for error, own in zip(row["found"], row["dense"], strict=True):
            assert error <= 1.5 * own + 1e-6, (name, row)
