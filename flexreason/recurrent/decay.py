"""Linear attention with a decay, in torch, a chunk at a time: what lightning attention is, and Mamba-2.

A head's state is multiplied by exp(decay) at each token, and the product of its key and its value is added; a query
reads it. Heads of a group share keys and queries, which are not repeated for them. For backward one state a chunk is
kept, the one that it begins from.

Shapes: B rows, L tokens, G groups, R heads of a group, D key size, E value size.
"""

import torch
from torch import Tensor


def decayed(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor | None, chunk: int, final: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, L, G, R, E] and, if `final`, the state behind the last token, [B, G, D, R, E].

    Args:
        q, k: [B, L, G, D]
        v: [B, L, G, R, E]
        decay: [B, L, G, R], the logarithm
        state: to begin from; None is zeros
    """
    outputs = []
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    later = causal.tril(-1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    parts = list(zip(*(x.split(chunk, 2) for x in (q, k, v)), decay.movedim(1, 3).split(chunk, 3), strict=True))
    for number, (q_i, k_i, v_i, decay_i) in enumerate(parts, 1):
        n_tokens, total = q_i.shape[2], decay_i.cumsum(3)
        # Each pair has its own sum: the difference of two long sums loses digits behind a token that forgets much.
        since = decay_i[..., None].where(later[:n_tokens, :n_tokens], 0.0).cumsum(3)
        ending = since[..., -1, :].transpose(2, 3)[..., None]
        since = since.masked_fill(~causal[:n_tokens, :n_tokens], -torch.inf)
        weights = torch.einsum("bgid,bgjd->bgij", q_i, k_i)[:, :, None] * since.exp()
        out = torch.einsum("bgrij,bgjre->bgire", weights, v_i)
        total = total.transpose(2, 3)[..., None]
        if state is not None:
            out = out + torch.einsum("bgid,bgdre->bgire", q_i, state) * total.exp()
        if final or number < len(parts):
            last = total[:, :, -1:]
            behind = torch.einsum("bgjd,bgjre->bgdre", k_i, v_i * ending.exp())
            state = behind if state is None else behind + state * last.exp()
        outputs.append(out)
    return torch.cat(outputs, 2).transpose(1, 2), state if final else None
