"""Break the code in one place at a time and see which test notices. A mutation that none notices is a failure.

make mutations
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

MUTATIONS = {  # name: (file, what stands there, what to write instead)
    "interval: the subtree's end counts as inside": (
        "mask.py", "(q < until[kv])", "(q <= until[kv])",
    ),
    "interval: a token does not see itself": (
        "mask.py", "return (kv <= q) & (q < until[kv])", "return (kv < q) & (q < until[kv])",
    ),
    "order: the child that fewest samples share first": (
        "tree.py", "return (-self.n_samples,", "return (self.n_samples,",
    ),
    "order: the smaller subtree first": (
        "tree.py", "-self.size, self.first_sample)", "self.size, self.first_sample)",
    ),
    "order: the first turn's branch first": (
        "layout.py", "    for i in reversed(range(len(parts))):\n        _, t, r", "    for i in range(len(parts)):\n        _, t, r",
    ),
    "turn/role: history holds reasoning too": (
        "mask.py", "kv_is(Role.PROMPT | Role.CONTEXT)", "kv_is(Role.PROMPT | Role.CONTEXT | Role.REASONING)",
    ),
    "turn/role: history holds the turn itself": (
        "mask.py", "(turn[kv] < turn[q])", "(turn[kv] <= turn[q])",
    ),
    "turn/role: a response does not see its reasoning": (
        "mask.py", "history | own_prompt | own_reasoning | own_segment", "history | own_prompt | own_segment",
    ),
    "turn/role: r_in sees the reasoning": (
        "mask.py", "kv_is(Role.REASONING) & q_is(Role.RESPONSE)", "kv_is(Role.REASONING) & q_is(Role.RESPONSE | Role.CONTEXT)",
    ),
    "turn/role: documents are one": (
        "mask.py", "            same_document & (", "            same_turn.any() & (",
    ),
    "turn/role: padding is a segment": (
        "mask.py", "            q == kv,", "            q >= kv,",
    ),
    "window: measured in indices": (
        "mask.py", "position[q] - position[kv] < window", "q - kv < window",
    ),
    "window: one token wider": (
        "mask.py", "position[q] - position[kv] < window", "position[q] - position[kv] <= window",
    ),
    "blocks: partial keys of a query block lost": (
        "blocks.py", "kv_num_blocks, kv_indices = _lists(partial, i, j, before)", "kv_num_blocks, kv_indices = _lists(full, i, j, before)",
    ),
    "blocks: full query blocks of a key block lost": (
        "blocks.py", "_lists(lambda j, i: full(i, j), j, i, behind)", "_lists(lambda j, i: full(i, j) & (i < 0), j, i, behind)",
    ),
    "blocks: a block is full one row early": (
        "blocks.py", "_ceil(begin + kv_size - 1, q_size)", "begin // q_size",
    ),
    "windowed blocks: the parent is the run before": (
        "blocks.py", "run[at[above.clamp(min=0)]], -1)", "run[begin] - 1, -1)",
    ),
    "windowed blocks: a run is whole though its ends are not": (
        "blocks.py", "high[q] - low[kv] < window", "low[q] - low[kv] < window",
    ),
    "targets: the token stored before predicts": (
        "layout.py", "sources[0] = fork[i] - 1", "sources[0] = start[i] - 1",
    ),
    "targets: one index off in the tree": (
        "tree.py", "path[sample.n_prompt - 1 : -1]", "path[sample.n_prompt :]",
    ),
    "roles: the last sample's, not the union": (
        "tree.py", "role[path] |= sample.roles", "role[path] = sample.roles",
    ),
    "rows: until is not moved to the document's place": (
        "row.py", '"until": layout.until + start', '"until": layout.until',
    ),
    "rows: target_source is not moved": (
        "row.py", '"target_source": layout.target_source + start', '"target_source": layout.target_source',
    ),
    "rows: padding is one long segment": (
        "row.py", "torch.arange(starts[-1] + 1, length + 1, dtype=torch.int32)", "torch.full((n_padding,), length, dtype=torch.int32)",
    ),
    "fp64: casts stay": (
        "testing.py", "if func is Tensor.float:", "if func is None:",
    ),
}  # fmt: skip


def main() -> int:
    chosen = [name for name in MUTATIONS if all(word in name for word in sys.argv[1:])]
    unseen = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("flexreason", "tests", "docs"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for part in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / part, folder)
        for name in chosen:
            file, old, new = MUTATIONS[name]
            path = Path(folder, "flexreason", file)
            source = path.read_text()
            assert source.count(old) == 1, f"{name}: found {source.count(old)} times in {file}: {old}"
            path.write_text(source.replace(old, new))
            caught = first_failure(folder)
            path.write_text(source)
            print(f"{name:<58} {caught or 'NOT NOTICED'}", flush=True)
            if caught is None:
                unseen.append(name)
    print(f"\n{len(chosen) - len(unseen)} of {len(chosen)} mutations noticed")
    return 1 if unseen else 0


def first_failure(folder: str) -> str | None:
    """The test that notices, run on the copy in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": folder, "HYPOTHESIS_PROFILE": "default"},
    )
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/|flexreason/)?(\S+)", done.stdout, re.MULTILINE)
    assert failed, done.stdout + done.stderr
    return failed.group(1)


if __name__ == "__main__":
    sys.exit(main())
