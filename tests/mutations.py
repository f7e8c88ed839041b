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
        "tree/mask.py", "(q < until[kv])", "(q <= until[kv])",
    ),
    "interval: a token does not see itself": (
        "tree/mask.py", "return (kv <= q) & (q < until[kv])", "return (kv < q) & (q < until[kv])",
    ),
    "order: the child that fewest samples share first": (
        "tree/merge.py", "return (-self.n_samples,", "return (self.n_samples,",
    ),
    "order: the smaller subtree first": (
        "tree/merge.py", "-self.size, self.first_sample)", "self.size, self.first_sample)",
    ),
    "order: the first turn's branch first": (
        "tree/layout.py", "    for i in reversed(range(len(parts))):\n        _, t, r", "    for i in range(len(parts)):\n        _, t, r",
    ),
    "turn/role: history holds reasoning too": (
        "tree/mask.py", "kv_is(Role.PROMPT | Role.CONTEXT)", "kv_is(Role.PROMPT | Role.CONTEXT | Role.REASONING)",
    ),
    "turn/role: history holds the turn itself": (
        "tree/mask.py", "(turn[kv] < turn[q])", "(turn[kv] <= turn[q])",
    ),
    "turn/role: a response does not see its reasoning": (
        "tree/mask.py", "history | own_prompt | own_reasoning | own_segment", "history | own_prompt | own_segment",
    ),
    "turn/role: r_in sees the reasoning": (
        "tree/mask.py", "kv_is(Role.REASONING) & q_is(Role.RESPONSE)", "kv_is(Role.REASONING) & q_is(Role.RESPONSE | Role.CONTEXT)",
    ),
    "turn/role: documents are one": (
        "tree/mask.py", "            same_document & (", "            same_turn.any() & (",
    ),
    "turn/role: padding is a segment": (
        "tree/mask.py", "            q == kv,", "            q >= kv,",
    ),
    "window: measured in indices": (
        "tree/mask.py", "(position[q] < behind[kv])", "(q - kv < window)",
    ),
    "window: one token wider": (
        "tree/mask.py", "(position[q] < behind[kv])", "(position[q] <= behind[kv])",
    ),
    "chunk: measured in indices": (
        "tree/mask.py", "(number[q] == number[kv])", "(q // chunk == kv // chunk)",
    ),
    "chunk: one token longer": (
        "tree/mask.py", "position // min(chunk, LONGEST)", "position // (min(chunk, LONGEST) + 1)",
    ),
    "blocks: partial keys of a query block lost": (
        "tree/blocks.py", "kv_num_blocks, kv_indices = _lists(partial, i, j, before)", "kv_num_blocks, kv_indices = _lists(full, i, j, before)",
    ),
    "blocks: full query blocks of a key block lost": (
        "tree/blocks.py", "_lists(lambda j, i: full(i, j), j, i, behind)", "_lists(lambda j, i: full(i, j) & (i < 0), j, i, behind)",
    ),
    "blocks: a block is full one row early": (
        "tree/blocks.py", "_ceil(begin + kv_size - 1, q_size)", "begin // q_size",
    ),
    "windowed blocks: the parent is the run before": (
        "tree/blocks.py", "run[at[above.clamp(min=0)]], -1)", "run[begin] - 1, -1)",
    ),
    "windowed blocks: a run is whole though its ends are not": (
        "tree/blocks.py", "high[q] - low[kv] < window", "low[q] - low[kv] < window",
    ),
    "targets: the token stored before predicts": (
        "tree/layout.py", "sources[0] = fork[i] - 1", "sources[0] = start[i] - 1",
    ),
    "targets: one index off in the tree": (
        "tree/merge.py", "path[sample.n_prompt - 1 : -1]", "path[sample.n_prompt :]",
    ),
    "roles: the last sample's, not the union": (
        "tree/merge.py", "role[path] |= sample.roles", "role[path] = sample.roles",
    ),
    "rows: until is not moved to the document's place": (
        "tree/row.py", '"until": layout.until + start', '"until": layout.until',
    ),
    "rows: target_source is not moved": (
        "tree/row.py", '"target_source": layout.target_source + start', '"target_source": layout.target_source',
    ),
    "rows: padding is one long segment": (
        "tree/row.py", "torch.arange(starts[-1] + 1, length + 1, dtype=torch.int32)", "torch.full((n_padding,), length, dtype=torch.int32)",
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
        "attention/segments.py", "            total += piece", "            total.copy_(piece)",
    ),
    "segments: sinks have no gradient": (
        "attention/segments.py", "d_sinks = -(taken * delta)", "d_sinks = 0 * (taken * delta)",
    ),
    "flash: a round is not merged, but replaces": (
        "attention/flash.py", "            pieces.merge(rows, rows_lse, more, more_lse.T)", "            rows.copy_(more)",
    ),
    "flash: what was merged is not written back": (
        "attention/flash.py", "            x.index_copy_(0, self.index, rows)", "            pass",
    ),
    "flash: gradients of the rounds are left out": (
        "attention/flash.py", "        for call in (work.first, *work.rounds):", "        for call in (work.first,):",
    ),
    "flash: the window is one longer": (
        "attention/flash.py", "\"window_size_left\": self.window - 1", "\"window_size_left\": self.window",
    ),
    "flash: a group of heads reads the first group's log-sum-exp": (
        "attention/flash.py", "_rows(out, queries), lse[0, queries].T", "_rows(out, queries), lse[0, : queries.stop - queries.start].T",
    ),
    "flash: rounds are not disjoint": (
        "attention/flash.py", "        while around and around[-1] <= r.q_start:", "        while around:",
    ),
    "flash: the share of a group of query heads replaces those before": (
        "attention/flash.py", "            _rows(gradient, heads).add_(total)", "            _rows(gradient, heads).copy_(total)",
    ),
    "flash: a full card is taken for a missing kernel": (
        "attention/flash.py", "    except torch.OutOfMemoryError:\n        raise\n", "",
    ),
    "window: a large one runs over": (
        "tree/mask.py", "position + min(window, LONGEST)", "position + window",
    ),
    "bench: a way that differs is the reference": (
        "bench/report.py", ' and not self.differs(one)]', "]",
    ),
    "bench: another loss is a success": (
        "bench/report.py", "and not any(map(self.differs, ran))", "",
    ),
    "bench: gradients are not compared": (
        "bench/measure.py", "return off or (one.gradient_error or 0.0) > ALIKE[dtype]", "return off",
    ),
    "bench: the leaking pass has responses twice": (
        "bench/steps.py", "once = role != int(Role.CONTEXT)", "once = role >= 0",
    ),
    "bench: shifted labels are not shifted": (
        "bench/steps.py", "source[layout.target_source == response[0] - 1] = context[-1]", "pass",
    ),
    "bench: padded samples predict from their padding": (
        "bench/batches.py", "starts = [n * longest for n in range(len(samples))]", "starts = [n * longest + 1 for n in range(len(samples))]",
    ),
    "bench: packed samples see each other": (
        "bench/batches.py", "ends = (offsets, offsets,", "ends = (offsets[[0, -1]], offsets[[0, -1]],",
    ),
    "bench: the last token of a sample predicts": (
        "bench/batches.py", "torch.arange(end - 1 - len(sample.target_ids), end - 1)", "torch.arange(end - len(sample.target_ids), end)",
    ),
    "flash: kernels are believed": (
        "attention/flash.py", "if not (a - b).norm() <= CLOSE * b.norm():", "if False:",
    ),
    "cover: a path ends too early": (
        "attention/cover.py", "        stop = chain.fork\n", "        stop = chain.fork - 1\n",
    ),
    "cover: a path is cut at no chunk": (
        "attention/cover.py", "            stops[1:1] = range", "            stops[1:1] = ()  # range",
    ),
    "flex: the softcap is dropped": (
        "attention/flex.py", "None if softcap is None else _capped(softcap)", "None",
    ),
    "patch: the hidden states gathered are one off": (
        "model/hooks.py", "with_states(output, output[0][:, source])", "with_states(output, output[0][:, source - 1])",
    ),
    "patch: no mask function is registered": (
        "attention/registry.py", "            AttentionMaskInterface.register(f\"{NAME}_{plain}\", _mask(ALL_MASK_ATTENTION_FUNCTIONS[plain]))\n", "",
    ),
    "patch: the hook before the decoder is not there": (
        "model/hooks.py", "            decoder.register_forward_pre_hook(self.before, with_kwargs=True),\n", "",
    ),
    "patch: the hook behind the decoder is not there": (
        "model/hooks.py", "            decoder.register_forward_hook(self.after, with_kwargs=True),\n", "",
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
        "model/hooks.py", "        self.row_loss.undo()\n", "",
    ),
    "loss: the mean is over targets, not over weights": (
        "model/loss.py", "divisor = w.sum() if n_items is None", "divisor = (w > 0).sum() if n_items is None",
    ),
    "loss: ignored labels count in the mean": (
        "model/loss.py", ".where(real, 0.0)\n", "\n",
    ),
    "segments: a second backward is silently wrong": (
        "attention/segments.py", "        if torch.is_grad_enabled():  #", "        if False:  #",
    ),
    "segments: autocast reaches into the tiled route": (
        "attention/segments.py", "torch.autocast(q.device.type, enabled=False)", "torch.autocast(q.device.type, enabled=torch.is_autocast_enabled(q.device.type))",
    ),
    "loss: an empty row divides by nothing": (
        "model/loss.py", "torch.where(real.any(), torch.nan, 1.0))", "divisor)",
    ),
    "refuse: samples may straddle a RoPE threshold": (
        "model/refuse.py", "        if not short and (", "        if False and (",
    ),
    "refuse: other layouts under the paper's rule": (
        "model/refuse.py", "    if differ.any():", "    if differ.all():",
    ),
    "refuse: whatever has a verdict is taken": (
        "proof/standing.py", "    if found.verdict == \"exact\":", "    if found.verdict:",
    ),
    "refuse: nothing is asked for proof": (
        "proof/standing.py", "if doubt := _doubt(root, found):", "if doubt := None:",
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
    "list: any source's is believed": (
        "proof/evidence.py", "(known.get(\"structure\"), known.get(\"source\")) == (structure, source)", "known.get(\"structure\") == structure",
    ),
    "list: any structure's is believed": (
        "proof/evidence.py", "(known.get(\"structure\"), known.get(\"source\")) == (structure, source)", "known.get(\"source\") == source",
    ),
    "list: any torch's is believed": (
        "proof/evidence.py", " and _is_listed_torch():", ":",
    ),
    "kept: whatever lies there is believed": (
        "proof/kept.py", "    if written[\"digest\"] != _digest([written[\"about\"], written[\"found\"]]):", "    if False:",
    ),
    "kept: a file about something else is believed": (
        "proof/kept.py", " and written[\"about\"] == about:", ":",
    ),
    "kept: another flexreason's is believed": (
        "proof/kept.py", "        \"flexreason\": own_source(),\n", "        \"flexreason\": \"any\",\n",
    ),
    "kept: all ranks test": (
        "proof/kept.py", "        if found := _read(path, about):  # by another rank, meanwhile\n            return found\n", "",
    ),
    "kept: what was put into transformers counts for all": (
        "proof/evidence.py", " or edited or replaced_in_memory(cls, structure):", " or edited:",
    ),
    "shrink: windows stay": (
        "proof/tiny.py", "(sliding_window|window_size|", "(window_size|",
    ),
    "shrink: chunks stay": (
        "proof/tiny.py", "^(attention_chunk_size|", "^(",
    ),
    "fp64: casts stay": (
        "proof/float64.py", "if func is Tensor.float:", "if func is None:",
    ),
    "head: logits are overwritten whatever stands behind the product": (
        "model/head.py", "return step is None or isinstance(step.next_functions[0][0], _Product._backward_cls)", "return True",
    ),
    "head: a second product overwrites the first": (
        "model/head.py", "if self.used or len(flat) > len(self.buffer):", "if len(flat) > len(self.buffer):",
    ),
    "head: the cap and scale behind the product are dropped": (
        "model/head.py", "return self.root.forward(input_ids=ids, use_cache=False, return_dict=True).logits[0]", "return self.root.lm_head(hidden)",
    ),
    "head: the decoder's hooks see its states twice": (
        "model/head.py", "        setattr(decoder, name, OrderedDict())", "        pass",
    ),
    "head: only what is outside the decoder trains": (
        "model/head.py", "return list(leaves.values())", "return [leaf for leaf in leaves.values() if all(leaf is not q for q in self.root.base_model.parameters())]",
    ),
    "head: the second sweep draws anew": (
        "model/head.py", "            torch.set_rng_state(ctx.random[0])", "            pass",
    ),
    "head: slopes are lost in fp16": (
        "model/head.py", "if largest else 1.0", "if not largest else 1.0",
    ),
    "head: temperature is not in the gradient": (
        "model/head.py", "* real / temperature)", "* real)",
    ),
    "head: ignored targets have a gradient": (
        "model/head.py", "upstream[chunk].to(high) * real /", "upstream[chunk].to(high) /",
    ),
    "head: the weight's gradient is the last chunk's": (
        "model/head.py", "self.totals[weight] = product(slope.t(), given)", "self.totals[weight] = slope.t() @ given",
    ),
    "head: the bias has no gradient": (
        "model/head.py", "self.totals[bias] = _add(self.totals[bias], slope.sum(0, dtype=high))", "pass",
    ),
    "head: autocast is forgotten in backward": (
        "model/head.py", "torch.random.fork_rng(ctx.devices), torch.autocast(**ctx.autocast):", "torch.random.fork_rng(ctx.devices):",
    ),
    "patch: all logits are made when the loss is chunked": (
        "model/hooks.py", "return with_states(output, output[0][:, :0])", "return output",
    ),
    "verify: groups of gradients are not compared": (
        "proof/report.py", 'allowed += [("gradients", error', '[("gradients", error',
    ),
    "verify: NaN counts as equal": (
        "proof/report.py", "if not error <= limit", "if error > limit",
    ),
    "verify: a parameter without a gradient is passed over": (
        "proof/gradients.py", "if name in missing:", "if False:",
    ),
    "verify: layouts are not looked at": (
        "proof/verify.py", "                if faults:", "                if False:",
    ),
    "verify: dropout stays on": (
        "proof/conditions.py", "        module.p = 0.0\n", "        pass\n",
    ),
    "verify: the limit of a dtype is far above the samples' own error": (
        "proof/verify.py", "FACTOR = 2.0", "FACTOR = 2e6",
    ),
    "diagnose: the target index is not looked at": (
        "proof/diagnose.py", "            if not right:\n", "            if False:\n",
    ),
    "diagnose: leaks are not looked for": (
        "proof/diagnose.py", "if bool(leaks.any()):", "if False:",
    ),
    "verify: a class that patch refuses is compared all the same": (
        "proof/verify.py", 'if against is not None and against[0] == "refused":', "if False:",
    ),
    "patch: attention that goes past us is not noticed": (
        "model/hooks.py", "if not kwargs[TREE].tables and not torch.compiler.is_compiling():", "if False:",
    ),
    "render: the clock goes on": (
        "chat/render.py", "token = _NOW.set(_NOW.get() or at or datetime.now())", "token = _NOW.set(None)",
    ),
    "render: the clock cannot be set from outside": (
        "chat/render.py", "_NOW.set(_NOW.get() or at or", "_NOW.set(at or",
    ),
    "render: the template keeps its own clock": (
        "chat/render.py", "    compiled.globals[\"strftime_now\"] = _strftime_now\n", "",
    ),
    "render: the sandbox is left": (
        "chat/render.py", "    compiled.globals[\"strftime_now\"] = _strftime_now\n",
        "    compiled.globals[\"strftime_now\"] = _strftime_now\n    compiled.environment.is_safe_attribute = lambda *_: True\n",
    ),
    "render: prompts without the generation prompt": (
        "chat/render.py", "add_generation_prompt=prompt,", "add_generation_prompt=False,",
    ),
    "render: tools are not shown": (
        "chat/render.py", "messages, tools=self.tools,", "messages, tools=None,",
    ),
    "render: options do not reach the template": (
        "chat/render.py", "tokenize=False, **self.options", "tokenize=False",
    ),
    "render: options that change what a sample is are taken": (
        "chat/render.py", "if taken := sorted(OURS & set(options)):", "if taken := sorted(OURS & set()):",
    ),
    "render: memory is not watched": (
        "chat/render.py", "used - entry[1] > MEMORY", "used < 0",
    ),
    "render: text of any size": (
        "chat/render.py", "if len(text) > LONGEST:", "if len(text) < 0:",
    ),
    "render: the last message is blamed": (
        "chat/render.py", "                if str(error) == words:", "                if False:",
    ),
    "messages: train: false is ignored": (
        "chat/messages.py", "return bool(message[key])", "return True",
    ),
    "messages: half a weight is a whole one": (
        "chat/messages.py", "if message[key] not in (0, 1):", "if False:",
    ),
    "messages: None fields stay": (
        "chat/messages.py", "{key: value for key, value in message.items() if value is not None}", "dict(message)",
    ),
    "messages: a think block may stand anywhere": (
        "chat/messages.py", "if not text.lstrip().startswith(OPEN):", "if OPEN not in text:",
    ),
    "messages: a think block need not be closed": (
        "chat/messages.py", "(head.strip(\"\\n\"), rest.lstrip(\"\\n\")) if found else None", "(head.strip(\"\\n\"), rest.lstrip(\"\\n\"))",
    ),
    "messages: inline reasoning is not taken out": (
        "chat/messages.py", "return {**bare, \"content\": inline[1]} if inline else bare", "return bare",
    ),
    "messages: one reasoning field is taken out": (
        "chat/messages.py", "if key not in REASONING_FIELDS}", "if key != REASONING_FIELDS[0]}",
    ),
    "messages: parts stand on one line": (
        "chat/messages.py", "\"\\n\".join(part[\"text\"]", "\" \".join(part[\"text\"]",
    ),
    "messages: arguments lose their letters": (
        "chat/messages.py", "json.dumps(arguments, ensure_ascii=False)\n", "json.dumps(arguments)\n",
    ),
    "messages: arguments given as text stay text": (
        "chat/messages.py", "if form == \"object\" and isinstance(arguments, str):", "if False:",
    ),
    "messages: arguments given as objects stay objects": (
        "chat/messages.py", "elif form == \"string\" and isinstance(arguments, dict):", "elif False:",
    ),
    "templates: think= is not taken": (
        "chat/template.py", "if self.think is not None:", "if False:",
    ),
    "templates: one token of several stops": (
        "chat/template.py", "while (more := self.special.match(text, end)) and more.group() != self.bos:", "while False:",
    ),
    "templates: the next role's token does not stop": (
        "chat/template.py", "if (next_role := self.special.match(after_tail.lstrip())) and next_role.group() != self.bos:",
        "if (next_role := None) is not None:",
    ),
    "templates: what begins a text stops one": (
        "chat/template.py", "if (next_role := self.special.match(after_tail.lstrip())) and next_role.group() != self.bos:",
        "if next_role := self.special.match(after_tail.lstrip()):",
    ),
    "templates: the stop token is left out": (
        "chat/template.py", "                return at + len(stop.text), stop\n", "                return at, stop\n",
    ),
    "templates: text behind the stop token is kept": (
        "chat/template.py", "                return at + len(stop.text), stop\n", "                return len(tail), stop\n",
    ),
    "templates: calls stop as answers do": (
        "chat/template.py", "((self.call_stop if calls else None), self.stop) if stop]", "(self.stop,) if stop]",
    ),
    "templates: a prompt that nobody asked for is part of the answer": (
        "chat/template.py", "            tail = self._without_prompt(tail)\n", "            pass\n",
    ),
    "templates: a prompt that nobody asked for comes before the stop": (
        "chat/template.py", "            kept = self._without_prompt(tail)\n", "            pass\n",
    ),
    "templates: any arguments will do": (
        "chat/template.py", "return \"any\" if len(takes) == 2 else takes[0] if takes else \"none\"", "return \"any\"",
    ),
    "templates: any content will do": (
        "chat/template.py", "return \"any\" if listed == plain else \"string\"", "return \"any\"",
    ),
    "templates: inline reasoning is shown in history": (
        "chat/template.py", "if not named and parts.split_inline(content) and not self.splits_inline:", "if False:",
    ),
    "templates: reasoning keeps a name that the template does not read": (
        "chat/template.py", "if named and self.fields and not any(name in message for name in self.fields):", "if False:",
    ),
    "templates: what two texts share may cut a token": (
        "chat/template.py", "            if found.start() < len(prefix) < found.end():\n                return text", "            if False:\n                return text",
    ),
    "turns: an empty block is not closed": (
        "chat/turns.py", "if not self.reasoning and (turn := self._close_block(known)):", "if False:",
    ),
    "turns: the block is opened twice": (
        "chat/turns.py", "opening = markers.rest_of_open(ahead) if opened else markers.open", "opening = markers.open",
    ),
    "turns: spliced reasoning is not closed": (
        "chat/turns.py", "f\"{opening}{reasoning}{markers.close}\"", "f\"{opening}{reasoning}\"",
    ),
    "turns: an empty block is not filled": (
        "chat/turns.py", "if markers.closing in lead and markers.closing:", "if False:",
    ),
    "turns: reasoning that does not come out is not missed": (
        "chat/turns.py", "if self.reasoning and \"r\" in missing:", "if False:",
    ),
    "turns: reasoning where thinking is off": (
        "chat/turns.py", "if off and self.reasoning and inside:", "if False:",
    ),
    "turns: what a template makes of marks is believed of all texts": (
        "chat/turns.py", "if not self._stands_for(marked, shown) and (seen := self._with_texts()):", "if seen := None:",
    ),
    "turns: a header that the message lacks is guessed": (
        "chat/turns.py", "if seam is None or not self._is_attribute(seam, lead, closed):", "if seam is None:",
    ),
    "seam: another role's name is the header's": (
        "chat/seam.py", "if all(names) and names[0] != names[1]:", "if False:",
    ),
    "seam: an attribute may be whole messages": (
        "chat/seam.py", "if not attribute or \"\\n\" in attribute or", "if not attribute or",
    ),
    "stop: the first special token, whatever stops": (
        "chat/template.py", "        if stop := self._end_of_turn(always):\n", "        if stop := None:\n",
    ),
    "stop: only eos_token stops": (
        "chat/template.py", "        return Stop(token, False) if token else None\n", "        return None\n",
    ),
    "template: dice are thrown": (
        "chat/render.py", "    if drawn := _dice(source):", "    if drawn := None:",
    ),
    "turns: what comes out twice is believed": (
        "chat/turns.py", "if slot in \"rc\" and shown.count(marked.marks[slot]) > 1:", "if False:",
    ),
    "turns: a call that does not come out is not missed": (
        "chat/turns.py", "if lost := [slot for slot in missing if slot != \"r\"]:", "if lost := []:",
    ),
    "turns: a stop token that has to be appended is not": (
        "chat/turns.py", "return body + stop.text if stop.appended else body, kept, stop", "return body, kept, stop",
    ),
    "turns: a pattern appends no stop token": (
        "chat/turns.py", "        if self.stop.appended:\n", "        if False:\n",
    ),
    "turns: a pattern keeps text behind the stop token": (
        "chat/turns.py", "tail[begin:], kept - begin, stop", "tail[begin:], kept, stop",
    ),
    "turns: a block that the prompt has closed is closed again": (
        "chat/turns.py", "if off and markers.around(lead):", "if False:",
    ),
    "turns: the response begins with the closing marker": (
        "chat/turns.py", "max(0, body.find(text)) + len(text) + between)", "max(0, body.find(text)) + len(text))",
    ),
    "encode: the prompt has one message too few": (
        "chat/encode.py", "        before = past[:number]\n", "        before = past[: number - 1]\n",
    ),
    "encode: history=content takes nothing out": (
        "chat/encode.py", "[parts.without_reasoning(message) for message in made] if self.history == \"content\" else made", "made",
    ),
    "encode: history=content takes the answer's own reasoning": (
        "chat/encode.py", "self._turn(render, finder, past, made, number)", "self._turn(render, finder, past, past, number)",
    ),
    "encode: the last turn is the first": (
        "chat/encode.py", "wanted = {assistants[-1]}", "wanted = {assistants[0]}",
    ),
    "encode: messages are trained on against their word": (
        "chat/encode.py", "if parts.is_trained(number, messages[number]) and number in wanted]", "if number in wanted]",
    ),
    "encode: the template sees what is for training": (
        "chat/encode.py", "template.in_form(parts.without_training_keys(message))", "template.in_form(message)",
    ),
    "encode: an encoder is kept though its tokenizer has grown": (
        "chat/encode.py", "len(tokenizer), tokenizer.eos_token)", "tokenizer.eos_token)",
    ),
    "encode: an encoder is kept though answers end otherwise": (
        "chat/encode.py", "len(tokenizer), tokenizer.eos_token)", "len(tokenizer))",
    ),
    "encode: one token more is reasoning": (
        "chat/encode.py", "turn.target[: turn.response]) - n_prompt\n", "turn.target[: turn.response]) - n_prompt + 1\n",
    ),
    "encode: history is of the turn after": (
        "chat/encode.py", "_repeated(turn_of[number], high - low)", "_repeated(turn_of[number] + 1, high - low)",
    ),
    "tokens: a target by itself": (
        "chat/tokens.py", "return before, all_[len(rest) :]", "return before, array(\"q\", self.tokens.whole(target))",
    ),
    "tokens: the first of the target is lost": (
        "chat/tokens.py", "return before, all_[len(rest) :]", "return before, all_[len(rest) + 1 :]",
    ),
    "tokens: the rest, though the prompt's tokens are others": (
        "chat/tokens.py", "if all_[: len(rest)] == rest and len(all_) > len(rest):", "if len(all_) > len(rest):",
    ),
    "tokens: whatever it decodes to": (
        "chat/tokens.py", "if found and _decode(decode, ids + found) in wanted:", "if found:",
    ),
    "tokens: pieces are used again where that is not safe": (
        "chat/tokens.py", "if self._cuts_are_safe(sorted(clean)) else (None, 0)", "if clean else (None, 0)",
    ),
    "tokens: the last piece is taken over whatever follows": (
        "chat/tokens.py", "while count and reach - at < self.tokens.longest + 1:", "while False:",
    ),
    "tokens: texts begin as the tokenizer likes": (
        "chat/tokens.py", "self.tokenizer(texts, add_special_tokens=False,", "self.tokenizer(texts, add_special_tokens=True,",
    ),
    "splitting: what just fits is too long": (
        "data/splitting.py", "strict=True) if size > length)", "strict=True) if size >= length)",
    ),
    "splitting: what is left out is not told": (
        "data/splitting.py", "sum(map(len, parts)) - whole, dropped)", "sum(map(len, parts)) - whole, [])",
    ),
    "splitting: what is computed twice is not told": (
        "data/splitting.py", "sum(map(len, parts)) - whole, dropped)", "0, dropped)",
    ),
    "splitting: a part's first turn loses its targets": (
        "data/splitting.py", "targets = number[layout.target_turn] >= 0", "targets = number[layout.target_turn] > 0",
    ),
    "splitting: targets are predicted from where the whole has them": (
        "data/splitting.py", "tensors[\"target_source\"] = before[tensors[\"target_source\"]]", "tensors[\"target_source\"] = tensors[\"target_source\"].clamp(max=int(before[-1]) - 1)",
    ),
    "splitting: targets keep the whole's turns": (
        "data/splitting.py", "tensors[\"target_turn\"] = number[tensors[\"target_turn\"]]", "pass",
    ),
    "splitting: subtrees end where the whole has it": (
        "data/splitting.py", "before[tensors[\"until\"].long()].to", "tensors[\"until\"].clamp(max=int(before[-1])).to",
    ),
    "splitting: history is the subtree before too": (
        "data/splitting.py", "needed[: index + 1] |= layout.until[: index + 1] > index", "needed[: index + 1] |= layout.until[: index + 1] >= index",
    ),
    "splitting: far neighbours share as much as near ones": (
        "data/splitting.py", "return min(shared[a:b])", "return max(shared[a:b])",
    ),
    "splitting: groups are as first found": (
        "data/splitting.py", "return _joined(together, groups[::-1], length)", "return groups[::-1]",
    ),
    "splitting: groups that fit to the token do not": (
        "data/splitting.py", "            if tokens[group] <= length:", "            if tokens[group] < length:",
    ),
    "pack: one more waits": (
        "data/pack.py", "if len(self.waiting) >= self.pool:", "if len(self.waiting) > self.pool:",
    ),
    "pack: the last one stays": (
        "data/pack.py", "        while self.waiting:", "        while len(self.waiting) > 1:",
    ),
    "pack: rows a token too long": (
        "data/pack.py", "((2 << room) - 1)", "((4 << room) - 1)",
    ),
    "pack: what fits to the token does not": (
        "data/pack.py", "((2 << room) - 1)", "((1 << room) - 1)",
    ),
    "pack: the shortest that fits": (
        "data/pack.py", "self.of_size[fitting.bit_length() - 1][-1]", "self.of_size[(fitting & -fitting).bit_length() - 1][-1]",
    ),
    "pack: a document as long as a row is refused": (
        "data/pack.py", "if not 1 <= size <= self.length:", "if not 1 <= size < self.length:",
    ),
    "pack: the state has no pool": (
        "data/pack.py", "[[number, self.size_of[number]] for number in self.waiting]", "[]",
    ),
    "pack: the state forgets who came first": (
        "data/pack.py", "[number for numbers in self.of_size.values() for number in numbers]", "sorted(self.waiting)",
    ),
    "pack: the state draws anew": (
        "data/pack.py", "        self.draw.setstate((version, tuple(numbers), gauss))\n", "",
    ),
    "pack: who moves up is not found again": (
        "data/pack.py", "self.waiting[at], self.at[last] = last, at", "self.waiting[at] = last",
    ),
    "collator: one layout of a list": (
        "data/collator.py", "for part in item for layout", "for part in item[:1] for layout",
    ),
    "collator: rows of any length": (
        "data/collator.py", "for layout in self._layouts(item)], self.length)", "for layout in self._layouts(item)])",
    ),
    "conversations: answers in a prompt are trained on": (
        "data/files.py", "{**m, \"train\": False} if m.get(\"role\") == \"assistant\" else m", "m",
    ),
    "conversations: ShareGPT's system prompt is lost": (
        "data/files.py", "made = [{\"role\": \"system\", \"content\": about[\"system\"]}, *made]", "pass",
    ),
    "conversations: all samples are of one": (
        "data/files.py", "isinstance(found, Sample) and group is not None and group == waiting[0]:", "isinstance(found, Sample):",
    ),
    "conversations: the last group is lost": (
        "data/files.py", "    if waiting:\n        yield Conv", "    if False:\n        yield Conv",
    ),
    "conversations: lines are counted from 0": (
        "data/files.py", "enumerate(file, start=1)", "enumerate(file, start=0)",
    ),
    "conversations: one conversation is many entries": (
        "data/files.py", "(\"role\" in whole[0] or \"from\" in whole[0])", "False",
    ),
    "conversations: a table's None stay": (
        "data/files.py", "without_none(entry) if table else entry", "entry",
    ),
    "conversations: tools stored as text are no tools": (
        "data/files.py", "tools, options = _loaded(about.get(\"tools\")),", "tools, options = about.get(\"tools\"),",
    ),
    "conversations: the entry's template options are lost": (
        "data/files.py", "_loaded(about.get(\"chat_template_kwargs\")) or {}", "{}",
    ),
    "gate: replaced parts are not looked for": (
        "proof/standing.py", "        changed = replaced_parts(root)\n        doubt =", "        changed = \"\"\n        doubt =",
    ),
    "gate: what is not exact in chunks gives log-probabilities": (
        "model/hooks.py", "Patch(root, backend, mask, loss, unchunked)", "Patch(root, backend, mask, loss)",
    ),
    "verify: what is not exact in chunks is compared in chunks": (
        "commands/verify.py", ", ask=reason_against_chunks)", ")",
    ),
    "verify: conversations of one turn are compared too": (
        "proof/conversations.py", "[one for one in given if one.layout.n_samples > 1]", "list(given)",
    ),
    "verify: conversations that are refused are passed over": (
        "data/excerpt.py", "if refusals.total and not (options.skip_invalid and found):", "if False:",
    ),
    "verify: ids that the model does not have are taken": (
        "data/excerpt.py", "if not 0 <= min(ids) <= max(ids) < vocabulary:", "if False:",
    ),
    "verify: history is the template's whatever is asked for": (
        "data/excerpt.py", "history=options.history or HISTORIES[0]", "history=HISTORIES[0]",
    ),
    "verify: options of the template are dropped": (
        "data/excerpt.py", "HISTORIES[0], **template)", "HISTORIES[0])",
    ),
    "verify: the last of much data are looked at": (
        "data/excerpt.py", "            step *= 2\n", "",
    ),
    "trainer: a step divides by its targets and not by their weight": (
        "train/sums.py", "(row[\"target_weight\"] * (row[\"labels\"] != IGNORED))", "(row[\"labels\"] != IGNORED)",
    ),
    "trainer: ranks do not sum": (
        "train/trainer.py", "me.accelerator.reduce(values, \"sum\") if me.args.world_size > 1 else values", "values",
    ),
    "trainer: the Trainer shuffles rows": (
        "train/trainer.py", "return SequentialSampler(data) if isinstance(data, Rows) else super()", "return super()",
    ),
    "dirt: it is trained in silence": (
        "chat/dirt.py", "    if error.reason not in accept:", "    if False:",
    ),
    "dirt: a block that never ends is closed": (
        "chat/dirt.py", "        if not closed:\n            return rest, pair\n", "        if not closed:\n            return rest, None\n",
    ),
    "dirt: a closing tag needs no opening one": (
        "chat/dirt.py", "        if closing not in rest:", "        if True:",
    ),
    "dirt: prompts open no block": (
        "chat/encode.py", "if half and bare and made and dirt.opened_by(", "if False and dirt.opened_by(",
    ),
    "row: a mask that was used says nothing of patching": (
        "tree/row.py", "fr.patch(model) first ", "",
    ),
    "report: an empty source stops it": (
        "commands/report.py", "    except (Refused, EmptySource):", "    except Refused:",
    ),
    "refuse: tokens that the model has not": (
        "model/refuse.py", "    if low < 0 or high >= known:", "    if False:",
    ),
    "collator: what a Trainer took out is not told": (
        "data/collator.py", "    return _lost(item) or ", "    return ",
    ),
    "trainer: accelerate repeats documents of data that do not come out even": (
        "train/trainer.py", "elif len(dataset) % multiple:", "elif False:",
    ),
    "trainer: accelerate repeats items of streams": (
        "train/filling.py", "for _ in range(-n % self.multiple):", "for _ in range(0):",
    ),
    "trainer: evaluation is what the Trainer says": (
        "train/trainer.py", "output.metrics.update({f\"{prefix}_{name}\": value for name, value in losses.items()})", "pass",
    ),
    "trainer: weights that are no numbers are saved": (
        "train/trainer.py", "not bool(torch.isfinite(_local(p)).all())), None)", "False), None)",
    ),
    "trainer: a loss that is no number goes on": (
        "train/trainer.py", "return value == value and abs(value) != float(\"inf\")", "return True",
    ),
    "trainer: accelerate reads streams for all ranks": (
        "train/trainer.py", "dataloader_config.dispatch_batches = False", "dataloader_config.dispatch_batches = None",
    ),
    "trainer: checkpoints are not sealed": (
        "train/trainer.py", "                checkpoints.seal(folder)\n", "",
    ),
    "checkpoints: a file that was cut is whole": (
        "train/checkpoints.py", "(folder / name).stat().st_size == size for", "(folder / name).exists() for",
    ),
    "checkpoints: any checkpoint is whole": (
        "train/checkpoints.py", "    except (OSError, ValueError):\n        return False", "    except (OSError, ValueError):\n        return True",
    ),
    "checkpoints: by name, 9 comes after 10": (
        "train/checkpoints.py", "return sorted(found, key=step_of)", "return sorted(found)",
    ),
    "sums: the last target of a turn has the next turn's role": (
        "train/sums.py", "return torch.cat([same & reasoning, same.new_zeros(1)])", "return torch.cat([reasoning, same.new_zeros(1)])",
    ),
    "sums: a target has the role of what predicts it": (
        "train/sums.py", "(row[\"role\"][0][source[1:]] & Role.REASONING)", "(row[\"role\"][0][source[:-1]] & Role.REASONING)",
    ),
    "sums: samples end at what predicts": (
        "train/sums.py", "+ 2) * last", "+ 1) * last",
    ),
    "along: the log keeps steps after the checkpoint": (
        "train/progress.py", "[\"step\"] <= step:", "[\"step\"] >= 0:",
    ),
    "along: nothing is saved at the end": (
        "train/progress.py", "else step % every == 0 or step == self.last\n        every = self.settings.evaluate_every", "else False\n        every = self.settings.evaluate_every",
    ),
    "run: another data goes on": (
        "train/record.py", "        if before[name] != now[name]:\n            changed", "        if name == \"model\" and before[name] != now[name]:\n            changed",
    ),
    "run: another model goes on": (
        "train/record.py", "        if before[name] != now[name]:\n            changed", "        if name == \"data\" and before[name] != now[name]:\n            changed",
    ),
    "run: other settings go on": (
        "train/record.py", "if name not in MAY_CHANGE and", "if False and",
    ),
    "prepare: the template does not matter": (
        "train/prepare.py", "        str(tokenizer.chat_template),\n", "",
    ),
    "prepare: samples longer than a row are dropped": (
        "train/prepare.py", "if long and too_long == \"refuse\":", "if False:",
    ),
    "documents: one too far in a batch": (
        "data/documents.py", "number // TOGETHER), number % TOGETHER\n        dtypes", "number // TOGETHER), max(0, number % TOGETHER - 1)\n        dtypes",
    ),
    "documents: a turn weighs by all targets": (
        "data/documents.py", "1 / n[layout.target_turn]", "1 / n.sum()[None][layout.target_turn * 0]",
    ),
    "rows: epochs are alike": (
        "data/rows.py", "seed = self.seed * 1_000_003 + epoch", "seed = self.seed * 1_000_003",
    ),
    "rows: steps span epochs": (
        "data/rows.py", "for _ in range(-len(made) % self.multiple):", "for _ in range(0):",
    ),
    "stream: ranks come out uneven": (
        "data/stream.py", "for _ in range(-n % self.multiple):", "for _ in range(0):",
    ),
    "collator: no documents are no row": (
        "data/collator.py", "if isinstance(item, list) and all(map(_is_document, item)):", "if isinstance(item, list) and item and all(map(_is_document, item)):",
    ),
    "patch: adapters are looked for once": (
        "model/hooks.py", "        if self.looked != _listened.count:", "        if False:",
    ),
    "patch: what holds a model is not asked": (
        "model/hooks.py", "            patch.held_by(holder)\n", "            pass\n",
    ),
    "patch: a loss function set later is lost": (
        "model/hooks.py", "        if not self.row_loss.in_place:", "        if False:",
    ),
    "patch: hooks registered later come too late": (
        "model/hooks.py", "                hooks.move_to_end(hook.id)", "                pass",
    ),
    "patch: a row leaves the models' configs renamed": (
        "model/hooks.py", "        for module, name, config, _ in self.makers:", "        for module, name, config, _ in ():",
    ),
    "patch: of two models any will do": (
        "model/hooks.py", "if len(found) > 1 and len(patched) != 1:", "if False:",
    ),
    "registry: a config within a config keeps its name": (
        "attention/registry.py", "return renamed(vars(self)[name])", "return vars(self)[name]",
    ),
    "registry: a model built from a view renames the config": (
        "attention/registry.py", "= name and name.removeprefix(f\"{NAME}_\")", "= name",
    ),
    "loss: 0 is no other weight": (
        "model/loss.py", "return bool(((weight != 1) & real).any())", "return bool(((weight != 1) & (weight != 0) & real).any())",
    ),
    "loss: a divisor may be negative": (
        "model/loss.py", "good = (divisor > 0) & divisor.isfinite()", "good = divisor.isfinite()",
    ),
    "refuse: the Trainer's count is a weight": (
        "model/refuse.py", "return n_items is count or (count is not None and handed_on)", "return False",
    ),
    "refuse: whoever is a Trainer counts": (
        "model/refuse.py", "if any(getattr(kind, way, None) is not getattr(trainer, way, None) for way in ways):", "if False:",
    ),
    "refuse: labels may be taken out": (
        "model/refuse.py", "if given.get(\"labels\") is None and given.get(\"shift_labels\") is not None:", "if False:",
    ),
    "head: what is outside the model is not trained": (
        "model/head.py", "return list(leaves.values())", "return [leaf for leaf in leaves.values() if any(leaf is p for p in self.root.parameters())]",
    ),
    "trainer: a step may weigh nothing": (
        "train/trainer.py", "total <= 0 and any(", "False and any(",
    ),
    "trainer: a row is evaluated by its own weight": (
        "train/trainer.py", "model(**inputs, num_items_in_batch=1).loss", "model(**inputs).loss",
    ),
}  # fmt: skip


CORE = ["tests/test_layout.py", "tests/test_mask.py", "tests/test_blocks.py", "tests/test_row.py"]
TESTS = {  # where to look for the test that notices, so that all of this takes minutes
    "attention/registry.py": [
        "tests/test_after_patch.py",
        "tests/test_families.py",
        "tests/test_patching.py",
        "tests/test_integrations.py",
    ],
    "attention/segments.py": ["tests/test_attention.py", "tests/test_patching.py", "tests/test_integrations.py"],
    "attention/flash.py": ["tests/test_flash.py"],
    "attention/cover.py": ["tests/test_cover.py", "tests/test_flash.py", "tests/test_attention.py"],
    "attention/": ["tests/test_attention.py"],
    "bench/": ["tests/test_bench.py"],
    "model/hooks.py": [
        *("tests/test_after_patch.py", "tests/test_head.py", "tests/test_patching.py", "tests/test_integrations.py")
    ],
    "model/loss.py": ["tests/test_weights.py", "tests/test_patching.py"],
    "model/refuse.py": [
        "tests/test_weights.py",
        "tests/test_after_patch.py",
        "tests/test_patching.py",
        "tests/test_families.py",
    ],
    "model/head.py": ["tests/test_head.py", "tests/test_after_patch.py"],
    "proof/standing.py": ["tests/test_patching.py", "tests/test_families.py"],
    "proof/selftest.py": ["tests/test_families.py"],
    "proof/tiny.py": ["tests/test_families.py"],
    "proof/float64.py": ["flexreason"],
    "proof/evidence.py": ["tests/test_newer.py", "tests/test_families.py"],
    "proof/kept.py": ["tests/test_newer.py"],
    "proof/source.py": ["tests/test_newer.py"],
    "proof/": ["tests/test_verification.py"],
    "chat/tokens.py": ["tests/test_tokens.py", "tests/test_encode.py"],
    "chat/messages.py": ["tests/test_encode.py", "tests/test_templates.py"],
    "chat/encode.py": ["tests/test_encode.py", "tests/test_templates.py", "tests/test_dirt.py"],
    "chat/dirt.py": ["tests/test_dirt.py"],
    "chat/": ["tests/test_seam.py", "tests/test_templates.py", "tests/test_encode.py", "tests/test_inference.py"],
    "commands/report.py": ["tests/test_report.py"],
    "data/excerpt.py": ["tests/test_verification.py"],
    "data/splitting.py": ["tests/test_splitting.py", "tests/test_packing_exact.py"],
    "data/pack.py": ["tests/test_pack.py"],
    "data/collator.py": ["tests/test_pack.py"],
    "data/files.py": ["tests/test_conversations.py", "tests/test_encode.py"],
    "data/documents.py": ["tests/test_train.py"],
    "data/rows.py": ["tests/test_train.py"],
    "data/stream.py": ["tests/test_row_trainer.py"],
    "train/checkpoints.py": ["tests/test_resume.py"],
    "train/progress.py": ["tests/test_resume.py", "tests/test_train.py"],
    "train/trainer.py": ["tests/test_weights.py", "tests/test_row_trainer.py", "tests/test_resume.py"],
    "train/filling.py": ["tests/test_row_trainer.py"],
    "train/sums.py": ["tests/test_row_trainer.py"],
    "train/": ["tests/test_train.py"],
    "": [*CORE, "tests/test_single_pass.py"],
}


def main() -> int:
    chosen = [name for name in MUTATIONS if all(word in name for word in sys.argv[1:])]
    unseen = []
    with tempfile.TemporaryDirectory() as folder:
        for part in ("flexreason", "tests", "docs"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__"))
        for part in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("requirements*.txt")):
            shutil.copy(part, folder)  # without all that tests read, their collection fails, and so "notices" anything
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
