"""Holding a patched model's single pass against the N samples on the untouched model."""

import torch

import flexreason as fr
from flexreason.proof import oracle
from flexreason.proof.float64 import relative_l2, true_float64

EXACT = 1e-9


def single_pass(model, row):
    """(loss, log-probability of every target in the row's order, gradients of the loss) of a patched model."""
    real = row["labels"][0] != -100
    model.zero_grad()
    out = model(**row)
    out.loss.backward()
    logits = out.logits[0, real]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logprobs = logits.log_softmax(-1).gather(1, row["labels"][0, real, None])[:, 0]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.loss.detach(), logprobs.detach(), gradients


def samples_of(layouts):
    return [sample for layout in layouts for sample in fr.unmerge(layout)]


def errors(model, layouts, length=None, **settings):
    """Relative errors of one row of `layouts` against their samples: loss, log-probabilities, worst gradient."""
    with true_float64():
        expected = oracle.n_samples(model, samples_of(layouts))
        fr.patch(model, **settings)
        try:
            loss, logprobs, gradients = single_pass(model, fr.collate(layouts, length))
        finally:
            fr.unpatch(model)
    n = expected.n_targets
    assert len(logprobs) == n
    worst = 0.0
    for name, gradient in expected.gradients.items():
        found = gradients.get(name, torch.zeros_like(gradient))
        worst = max(worst, relative_l2([found * n], [gradient]))
    return {
        "loss": abs(float(loss) * n / expected.loss_sum - 1),
        "logprobs": relative_l2([logprobs], [torch.cat(expected.logprobs)]),
        "gradients": worst,
    }
