"""The loss alone, forward and backward on given logits, against Hugging Face's `get_nll`.

Legend: B questions, K passages per question, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Line, Side, Size, alternate, main
from benchmarks.parts.models import IGNORE, PAD, START, answers, bart
from rag_core.reading.likelihood import Variant, rag_sequence_nll, rag_token_nll
from tests.support.models.hf_rag import hf_rag

LOSSES = {"sequence": rag_sequence_nll, "token": rag_token_nll}


def _inputs(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    B, K, T, V = (8, 5, 16, 50_265) if size == "full" else (2, 2, 4, 300)
    random = torch.Generator().manual_seed(3)
    logits_BKTV = (3 * torch.randn(B, K, T, V, generator=random)).requires_grad_()
    doc_scores_BK = torch.randn(B, K, generator=random).requires_grad_()
    # The last position has no label, because Hugging Face's loss reads one answer token more than it scores.
    labels_BT = torch.nn.functional.pad(answers(V, B, T - 1), (0, 1), value=IGNORE)
    return logits_BKTV, doc_scores_BK, labels_BT


def _result(loss: Tensor, logits_BKTV: Tensor, doc_scores_BK: Tensor) -> np.ndarray:
    """Loss and a sample of its gradients. Resets the gradients for the next call."""
    assert logits_BKTV.grad is not None
    assert doc_scores_BK.grad is not None
    result = torch.cat([loss.detach().view(1), doc_scores_BK.grad.flatten(), logits_BKTV.grad.flatten()[::9973]])
    logits_BKTV.grad = doc_scores_BK.grad = None
    return result.numpy()


def prepare_ours(size: Size, variant: Variant) -> Callable[[], np.ndarray]:
    """Our loss on the logits."""
    logits_BKTV, doc_scores_BK, labels_BT = _inputs(size)

    def work() -> np.ndarray:
        loss = LOSSES[variant](logits_BKTV, doc_scores_BK, labels_BT).sum()
        loss.backward()
        return _result(loss, logits_BKTV, doc_scores_BK)

    return work


def prepare_peer(size: Size, variant: Variant) -> Callable[[], np.ndarray]:
    """Their loss on the logits. Their labels are the decoder's inputs, start token first."""
    logits_BKTV, doc_scores_BK, labels_BT = _inputs(size)
    model: Any = hf_rag(bart("smoke"), variant)
    starts_B1 = torch.full((len(labels_BT), 1), START)
    target_BT = torch.cat([starts_B1, labels_BT[:, :-1].where(labels_BT[:, :-1] != IGNORE, PAD)], dim=1)
    K = doc_scores_BK.shape[1]

    def work() -> np.ndarray:
        loss = model.get_nll(logits_BKTV.flatten(0, 1), doc_scores_BK, target_BT, n_docs=K).sum()
        loss.backward()
        return _result(loss, logits_BKTV, doc_scores_BK)

    return work


def measure(size: Size) -> list[Line]:
    """One line per variant."""
    lines = []
    for variant in ("sequence", "token"):
        with Side(prepare_ours, size, variant) as ours, Side(prepare_peer, size, variant) as peer:
            pairs = alternate(ours, peer, 7 if size == "full" else 1)
        difference = float(np.abs(pairs.ours[0].result - pairs.peer[0].result).max())
        relative = abs(pairs.ours[0].result[0] / pairs.peer[0].result[0] - 1)
        lines.append(
            Line(
                path=f"loss alone, RAG-{variant.capitalize()}, float32",
                peer="get_nll",
                value=pairs.speedup,
                target=3.0,
                memory=pairs.rise_ratio,
                memory_target=0.35,
                outputs=f"loss apart by {relative:.0e} of itself, gradients by {difference:.0e}",
                outputs_equal=bool(relative < 1e-5),
                details=pairs.details(),
            )
        )
    return lines


if __name__ == "__main__":
    main(measure)
