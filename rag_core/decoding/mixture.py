"""The mixture of the passages' next-token distributions, and its best entries; each takes one pass over the vocabulary.

Legend: A questions, K passages per question, W hypotheses, V vocabulary, C candidates, F continuations of a question
(W·V), G blocks of those.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Size of the blocks in which `best_of` searches: one pass finds the maximum of every block.
_BLOCK = 256


def next_log_probs(logits_AKWV: Tensor, log_docs_AK: Tensor) -> tuple[Tensor, Tensor]:
    """log Σ_z p(z|q) p(·|q,z,a_<t), shape (A, W, V), in a new buffer, and the logits' logsumexp, shape (A, K, W).

    Both are at least float32. With K > 1, a probability below the type's smallest normal number counts as that number.
    """
    K, dtype = log_docs_AK.shape[1], log_docs_AK.dtype
    top_AKW = logits_AKWV.amax(dim=3).to(dtype)
    if K == 1:
        log_probs_AWV = torch.log_softmax(logits_AKWV.squeeze(1), dim=2, dtype=dtype)
        normalisers_AKW = top_AKW - log_probs_AWV.amax(dim=2).unsqueeze(1)
        return log_probs_AWV.add_(log_docs_AK.unsqueeze(2)), normalisers_AKW
    docs_AK11 = log_docs_AK.exp()[:, :, None, None]
    mixture_AWV, most_AKW = logits_AKWV.new_zeros(()), torch.empty_like(top_AKW)
    for k in range(K):  # one passage at a time: its probabilities stay in the processor's cache
        probs_AWV = torch.softmax(logits_AKWV[:, k], dim=2, dtype=dtype)
        most_AKW[:, k] = probs_AWV.amax(dim=2)
        mixture_AWV = mixture_AWV.addcmul_(probs_AWV, docs_AK11[:, k]) if k else probs_AWV.mul_(docs_AK11[:, k])
    return mixture_AWV.clamp_(min=torch.finfo(dtype).tiny).log_(), top_AKW - most_AKW.log_()


def best_of(ranked_AF: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Exact `topk` in one pass: the best C are in the C blocks with the greatest maxima, or in the rest behind them."""
    A, F = ranked_AF.shape
    G = F // _BLOCK
    if G <= 2 * C:
        return ranked_AF.topk(C, dim=1)
    blocks_AGb = ranked_AF[:, : G * _BLOCK].view(A, G, _BLOCK)
    best_AC = blocks_AGb.amax(dim=2).topk(C, dim=1).indices
    rows_A1 = torch.arange(A, device=best_AC.device).unsqueeze(1)
    rest_Ar = torch.arange(G * _BLOCK, F, device=best_AC.device).expand(A, -1)
    places_ACb = best_AC.unsqueeze(2) * _BLOCK + torch.arange(_BLOCK, device=best_AC.device)
    places_AP = torch.cat((places_ACb.flatten(1), rest_Ar), dim=1)
    values_AP = torch.cat((blocks_AGb[rows_A1, best_AC].flatten(1), ranked_AF[:, G * _BLOCK :]), dim=1)
    values_AC, top_AC = values_AP.topk(C, dim=1)
    return values_AC, places_AP.gather(1, top_AC)
