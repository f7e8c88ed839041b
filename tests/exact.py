"""Holding a patched model's single pass against the N samples on the untouched model; and the plain pass, which is
wrong."""

import torch

import flexreason as fr
from flexreason.proof import oracle
from flexreason.proof.compare import EXACT, compare, gradient_errors, one_pass
from flexreason.proof.float64 import true_float64

__all__ = ["EXACT", "errors", "plain_pass", "samples_of", "single_pass", "worst_gradient"]


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
            return compare(one_pass(model, fr.collate(layouts, length)), expected).largest()
        finally:
            fr.unpatch(model)


def worst_gradient(gradients, expected):
    """The largest relative error of a parameter's gradient, of two dicts by name; one that is missing is all wrong."""
    given = {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}
    _, parameters, _ = gradient_errors(lambda handle: [handle(name, g) for name, g in given.items()], expected)
    return max(torch.inf if error != error else error for error in parameters.values())


def plain_pass(model, turns):
    """[n] log-probabilities of all reasoning and responses in one plain pass over `[(h, t, r), ...]` as it stands."""
    ids, scored = [], []
    for human, reasoning, response in turns:
        ids += human
        scored += range(len(ids), len(ids) + len(reasoning) + len(response))
        ids += [*reasoning, *response]
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return torch.stack([logprobs[at - 1, ids[at]] for at in scored])
