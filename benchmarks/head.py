"""The head at a large vocabulary: full logits against the chunked loss, token log-probabilities, and what torch has.

    python benchmarks/head.py                    # 8192 targets, 151,936 words, width 1024: 16 GiB, minutes
    python benchmarks/head.py --targets 2048     # smaller

Every way is given the same hidden states, and gives the loss and its gradients by these and by the head's weight
(`no_grad` ways: log-probabilities alone). *Plain* is what a model does: all logits, then cross-entropy. Peak is what a
way adds at most to the memory of the process, gradients included.
"""

import argparse
import statistics

import torch
from torch.nn import functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast

from flexreason.model import head
from measure import interleaved, median_ratio, peak_mib, print_json, print_table


def ways(model, hidden, labels):
    """name -> (what it does, whether with gradients)."""
    own, n = head.Head(model, BaseModelOutputWithPast()), len(labels)
    weight = torch.full((n,), 1 / n)

    def with_gradients(make):
        def step():
            model.zero_grad()
            hidden.grad = None
            make().backward()

        return step

    def plain():
        return F.cross_entropy(model.lm_head(hidden).float(), labels)

    def torch_own(**options):
        def make():
            chosen = torch.nn.LinearCrossEntropyOptions(**options)
            return F.linear_cross_entropy(hidden, model.lm_head.weight, labels, options=chosen)

        return make

    @torch.no_grad()
    def plain_logprobs():
        return model.lm_head(hidden).float().log_softmax(-1).gather(1, labels[:, None])

    @torch.no_grad()
    def token_logprobs():
        return head.logprobs(own, hidden, labels)

    found = {
        "plain": with_gradients(plain),
        "chunked loss": with_gradients(lambda: head.weighted_nll(own, hidden, labels, weight)[0]),
        "token_logprobs": with_gradients(lambda: -head.logprobs(own, hidden, labels).mean()),
        "plain, no_grad": plain_logprobs,
        "token_logprobs, no_grad": token_logprobs,
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        for size in (128, 512):
            found[f"torch's, chunks of {size}"] = with_gradients(torch_own(batch_chunk_size=size, chunking_method=None))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", nargs="*", help="ways that begin so, beside plain")
    options = parser.parse_args()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    dtype = getattr(torch, options.dtype)
    model = Qwen3ForCausalLM(config).to(dtype)
    hidden = torch.randn(options.targets, options.width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, options.vocabulary, (options.targets,))
    found = ways(model, hidden, labels)
    if options.only:
        found = {k: v for k, v in found.items() if k.startswith(("plain", *options.only))}

    gradients = {}
    for name, step in found.items():
        if "no_grad" not in name and name != "plain":
            step()
            gradients[name] = (hidden.grad, model.lm_head.weight.grad)
    found["plain"]()
    for name, (by_hidden, by_weight) in gradients.items():
        for a, b in ((by_hidden, hidden.grad), (by_weight, model.lm_head.weight.grad)):
            error = float((a.float() - b.float()).norm() / b.float().norm())
            assert error < (1e-4 if dtype == torch.float32 else 0.05), (name, error)
    gradients.clear()
    by_hidden = by_weight = a = b = None

    peaks = {}
    for name, step in found.items():
        model.zero_grad()
        hidden.grad = None
        peaks[name] = peak_mib(step)
    times = interleaved(found, options.repeats, warm_up=0)  # checking and measuring peaks warmed them up
    rows = []
    for name in found:
        base = "plain, no_grad" if name.endswith("no_grad") else "plain"
        rows.append(
            {
                "way": name,
                "seconds": statistics.median(times[name]),
                "time / plain": median_ratio(times[name], times[base]),
                "peak MiB": peaks[name],
                "peak / plain": peaks[name] / peaks[base],
            }
        )
    print_table(
        f"{options.targets} targets, vocabulary {options.vocabulary:,}, width {options.width}, {options.dtype}", rows
    )
    print_json(benchmark="head", head=rows)


if __name__ == "__main__":
    main()
