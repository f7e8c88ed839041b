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
    "chunk: measured in indices": (
        "mask.py", "position[q] // chunk == position[kv] // chunk", "q // chunk == kv // chunk",
    ),
    "chunk: one token longer": (
        "mask.py", "position[q] // chunk == position[kv] // chunk", "position[q] // (chunk + 1) == position[kv] // (chunk + 1)",
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
    "cover: the corner in the diagonal tile is computed twice": (
        "attention/cover.py", "    if k_stop > tile:", "    if k_stop < 0:",
    ),
    "cover: the edge of the window is whole": (
        "attention/cover.py", "low, cut, edge=True)", "low, cut)",
    ),
    "merge: the old log-sum-exp stays": (
        "attention/pieces.py", "    lse.copy_(both)", "    both = both",
    ),
    "merge: one half is not weighed down": (
        "attention/pieces.py", "out.lerp_(more_out.to(out.dtype), (more_lse - both).exp_().unsqueeze(-1))",
        "out.add_(more_out.to(out.dtype) * (more_lse - both).exp_().unsqueeze(-1))",
    ),
    "fused backward: the delta term is dropped": (
        "attention/pieces.py", "return _fused_backward(grad, q, k, v, out, lse,", "return _fused_backward(grad, q, k, v, out * 0, lse,",
    ),
    "tiled backward: the delta term is dropped": (
        "attention/pieces.py", " - delta_r) * slope", ") * slope",
    ),
    "tiled backward: the softcap's slope is dropped": (
        "attention/pieces.py", "self.scale * (1 - (score / self.softcap).square())", "self.scale",
    ),
    "segments: a rectangle's gradients replace those before": (
        "attention/segments.py", "                total += piece", "                total.copy_(piece)",
    ),
    "segments: sinks have no gradient": (
        "attention/segments.py", "d_sinks = -(taken * delta)", "d_sinks = 0 * (taken * delta)",
    ),
    "flex: the softcap is dropped": (
        "attention/flex.py", "None if softcap is None else _capped(softcap)", "None",
    ),
    "patch: the hidden states gathered are one off": (
        "patching.py", "output.last_hidden_state[:, source]", "output.last_hidden_state[:, source - 1]",
    ),
    "patch: no mask function is registered": (
        "attention/registry.py", "        AttentionMaskInterface.register(name, _mask(ALL_MASK_ATTENTION_FUNCTIONS[previous]))\n", "",
    ),
    "patch: the hook before the decoder is not there": (
        "patching.py", "            decoder.register_forward_pre_hook(self.before, with_kwargs=True),\n", "",
    ),
    "patch: the hook behind the decoder is not there": (
        "patching.py", "            decoder.register_forward_hook(self.after, with_kwargs=True),\n", "",
    ),
    "patch: layers have no window": (
        "attention/registry.py", "window=asked.window", "window=None",
    ),
    "patch: layers have no chunk": (
        "attention/registry.py", "chunk=asked.chunk", "chunk=None",
    ),
    "patch: chunks are taken for windows": (
        "attention/registry.py", "Asked(window=size, tree=tree), Asked(chunk=size, tree=tree)]", "Asked(window=size, tree=tree)]",
    ),
    "patch: any mask will do": (
        "attention/registry.py", "        if found == [", "        if found or [",
    ),
    "patch: the softcap is dropped": (
        "attention/registry.py", "softcap=softcap, sinks=s_aux", "softcap=None, sinks=s_aux",
    ),
    "patch: the sinks are dropped": (
        "attention/registry.py", "softcap=softcap, sinks=s_aux", "softcap=softcap, sinks=None",
    ),
    "patch: the model's own scale is dropped": (
        "attention/registry.py", "if scaling is None else scaling", "if scaling is None else q.shape[-1] ** -0.5",
    ),
    "patch: Llama 4's temperature by place in storage": (
        "attention/registry.py", "    q = _tempered(module, q, tree)\n", "",
    ),
    "patch: the mask does not carry the tree": (
        "attention/registry.py", " or getattr(attention_mask, \"tree\", None)", "",
    ),
    "patch: the decoder is base_model alone": (
        "attention/registry.py", "        found = parts[0] if len(parts) == 1 else root", "        found = root",
    ),
    "patch: the decoder is never below base_model": (
        "attention/registry.py", "                return inner\n", "                return found\n",
    ),
    "patch: q and k are not cast under autocast": (
        "attention/registry.py", "    if q.dtype != v.dtype:", "    if q.dtype is None:",
    ),
    "patch: unpatch leaves the loss": (
        "patching.py", "        self.root.loss_function.undo(self.root)\n", "",
    ),
    "loss: the mean is over targets, not over weights": (
        "loss.py", "            total = weight.sum()\n", "            total = (weight > 0).sum()\n",
    ),
    "loss: ignored labels count in the mean": (
        "loss.py", " * (labels[0] != IGNORED).to(nll)", "",
    ),
    "segments: a second backward is silently wrong": (
        "attention/segments.py", "        if torch.is_grad_enabled():  #", "        if False:  #",
    ),
    "segments: autocast reaches into the tiled route": (
        "attention/segments.py", "torch.autocast(q.device.type, enabled=False)", "torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type))",
    ),
    "loss: an empty row divides by nothing": (
        "loss.py", "            total = torch.where(total > 0, total, 1)\n", "",
    ),
    "refuse: samples may straddle a RoPE threshold": (
        "refuse.py", "        if not short and (", "        if False and (",
    ),
    "refuse: other layouts under the paper's rule": (
        "refuse.py", "    if differ.any():", "    if differ.all():",
    ),
    "refuse: whatever has a verdict is taken": (
        "refuse.py", "    if found.verdict == \"exact\":", "    if found.verdict:",
    ),
    "refuse: nothing is asked for proof": (
        "refuse.py", "None if _untested.get() else reason_to_doubt(root)", "None",
    ),
    "self-test: gradients are not looked at": (
        "proof/selftest.py", "\"gradients\": worst_gradient(pairs)[0]", "\"gradients\": 0.0",
    ),
    "self-test: log-probabilities and gradients are not looked at": (
        "proof/selftest.py", "    if not max(worst.values()) <= EXACT:", "    if not worst[\"loss\"] <= 1:",
    ),
    "self-test: RoPE's threshold is not looked at": (
        "proof/selftest.py", "        _must_refuse(model, straddling)\n", "",
    ),
    "list: any version's is believed": (
        "proof/models.py", " or listed()[\"transformers\"] != transformers.__version__", "",
    ),
    "list: any structure's is believed": (
        "proof/models.py", "known and known[\"structure\"] == structure", "known",
    ),
    "shrink: windows stay": (
        "proof/shrink.py", "(sliding_window|window_size|", "(window_size|",
    ),
    "shrink: chunks stay": (
        "proof/shrink.py", "^(attention_chunk_size|", "^(",
    ),
    "fp64: casts stay": (
        "proof/testing.py", "if func is Tensor.float:", "if func is None:",
    ),
    "head: logits are overwritten whatever stands behind the product": (
        "head.py", "return step is None or isinstance(step.next_functions[0][0], _Product._backward_cls)", "return True",
    ),
    "head: a second product overwrites the first": (
        "head.py", "if self.used or len(flat) > len(self.buffer):", "if len(flat) > len(self.buffer):",
    ),
    "head: the cap and scale behind the product are dropped": (
        "head.py", "return self.root.forward(input_ids=ids, use_cache=False, return_dict=True).logits[0]", "return self.root.lm_head(hidden)",
    ),
    "head: the decoder's hooks see its states twice": (
        "head.py", "        setattr(decoder, name, OrderedDict())", "        pass",
    ),
    "head: only what is outside the decoder trains": (
        "head.py", "if p.requires_grad and id(p) in leaves]", "if p.requires_grad and id(p) in leaves and all(p is not q for q in self.root.base_model.parameters())]",
    ),
    "head: the second sweep draws anew": (
        "head.py", "            torch.set_rng_state(ctx.random[0])", "            pass",
    ),
    "head: slopes are lost in fp16": (
        "head.py", "if largest else 1.0", "if not largest else 1.0",
    ),
    "head: temperature is not in the gradient": (
        "head.py", "* real / temperature)", "* real)",
    ),
    "head: ignored targets have a gradient": (
        "head.py", "upstream[chunk].to(high) * real /", "upstream[chunk].to(high) /",
    ),
    "head: the weight's gradient is the last chunk's": (
        "head.py", "self.totals[weight] = product(slope.t(), given)", "self.totals[weight] = slope.t() @ given",
    ),
    "head: the bias has no gradient": (
        "head.py", "self.totals[bias] = _add(self.totals[bias], slope.sum(0, dtype=high))", "pass",
    ),
    "head: autocast is forgotten in backward": (
        "head.py", "torch.random.fork_rng(ctx.devices), torch.autocast(**ctx.autocast):", "torch.random.fork_rng(ctx.devices):",
    ),
    "patch: all logits are made when the loss is chunked": (
        "patching.py", "return with_states(output, output[0][:, :0])", "return output",
    ),
    "verify: groups of gradients are not compared": (
        "proof/verification.py", 'allowed += [("gradients", error', '[("gradients", error',
    ),
    "verify: NaN counts as equal": (
        "proof/verification.py", "if not error <= limit", "if error > limit",
    ),
    "verify: a parameter without a gradient is passed over": (
        "proof/verification.py", "if name in missing:", "if False:",
    ),
    "verify: layouts are not looked at": (
        "proof/verification.py", "                if faults:", "                if False:",
    ),
    "verify: dropout stays on": (
        "proof/verification.py", "        module.p = 0.0\n", "        pass\n",
    ),
    "verify: the limit of a dtype is far above the samples' own error": (
        "proof/verification.py", "FACTOR = 2.0", "FACTOR = 2e6",
    ),
    "diagnose: the target index is not looked at": (
        "proof/diagnose.py", "            if not right:\n", "            if False:\n",
    ),
    "diagnose: leaks are not looked for": (
        "proof/diagnose.py", "if bool(leaks.any()):", "if False:",
    ),
    "verify: a class that patch refuses is compared all the same": (
        "proof/verification.py", 'if against is not None and against[0] == "refused":', "if False:",
    ),
    "patch: attention that goes past us is not noticed": (
        "patching.py", "if not kwargs[TREE].tables and not torch.compiler.is_compiling():", "if False:",
    ),
}  # fmt: skip


CORE = ["tests/test_layout.py", "tests/test_mask.py", "tests/test_blocks.py", "tests/test_row.py"]
TESTS = {  # where to look for the test that notices, so that all of this takes minutes
    "attention/registry.py": ["tests/test_families.py", "tests/test_patching.py", "tests/test_integrations.py"],
    "attention/segments.py": ["tests/test_attention.py", "tests/test_patching.py", "tests/test_integrations.py"],
    "attention/": ["tests/test_cover.py", "tests/test_attention.py"],
    "patching.py": ["tests/test_head.py", "tests/test_patching.py", "tests/test_integrations.py"],
    "loss.py": ["tests/test_patching.py"],
    "refuse.py": ["tests/test_patching.py", "tests/test_families.py"],
    "head.py": ["tests/test_head.py"],
    "proof/verification.py": ["tests/test_verification.py"],
    "proof/diagnose.py": ["tests/test_verification.py"],
    "proof/selftest.py": ["tests/test_families.py"],
    "proof/models.py": ["tests/test_families.py"],
    "proof/shrink.py": ["tests/test_families.py"],
    "proof/testing.py": ["flexreason"],
    "": [*CORE, "tests/test_single_pass.py"],
}


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
            caught = first_failure(folder, next(tests for part, tests in TESTS.items() if part in file))
            path.write_text(source)
            print(f"{name:<58} {caught or 'NOT NOTICED'}", flush=True)
            if caught is None:
                unseen.append(name)
    print(f"\n{len(chosen) - len(unseen)} of {len(chosen)} mutations noticed")
    return 1 if unseen else 0


def first_failure(folder: str, tests: list[str]) -> str | None:
    """The test that notices, run on the copy in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "-p", "no:cacheprovider", *tests],
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
