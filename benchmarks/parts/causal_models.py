"""A Llama-like generator for benchmarks, and plain Transformers code that trains it and decodes with it: the peers.

Legend: B questions, K passages per question, S context tokens, T answer tokens, R rows (B·K), H hypotheses in a beam,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Size
from benchmarks.parts.models import IGNORE, INIT_STD, PAD, START

END = START
# Logits get a standard deviation of about 7.
HEAD_STD: dict[Size, float] = {"full": 0.3, "smoke": 1.2}


def llama(size: Size, *, peaked: bool = False) -> Any:
    """8 layers of 512 dimensions, 8 query and 2 key heads, 49,152 tokens (smoke: 2 of 32, 300), tied, float32.

    `peaked` gives it a head of its own, wide enough for next-token probabilities like a trained model's.
    """
    full = size == "full"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152 if full else 300,
        hidden_size=512 if full else 32,
        intermediate_size=1536 if full else 64,
        num_hidden_layers=8 if full else 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=INIT_STD,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    if peaked:
        head_VD = torch.normal(0.0, HEAD_STD[size], (config.vocab_size, config.hidden_size))
        model.lm_head.weight = torch.nn.Parameter(head_VD)
    return model


def causal_contexts(size: Size, V: int) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts of 64 to 192 tokens, padded on the left, and document scores: B = 8, K = 5 (smoke: 2, 2)."""
    B, K, shortest, longest = (8, 5, 64, 192) if size == "full" else (2, 2, 8, 16)
    random = torch.Generator().manual_seed(1)
    lengths_BK = torch.randint(shortest, longest + 1, (B, K), generator=random)
    lengths_BK[0, 0] = longest
    ids_BKS = torch.randint(4, V, (B, K, longest), generator=random)
    mask_BKS = (torch.arange(longest) >= longest - lengths_BK.unsqueeze(2)).long()
    return ids_BKS.masked_fill(mask_BKS == 0, PAD), mask_BKS, torch.randn(B, K, generator=random)


def operations(model: Any, tokens: int, predictions: int) -> float:
    """Floating-point operations of a forward pass: two per weight and token, without the attention products."""
    head = model.get_output_embeddings().weight.numel()
    layers = sum(weight.numel() for name, weight in model.named_parameters() if "layers" in name)
    return 2.0 * (tokens * layers + predictions * head)


def plain_nll(model: Any, contexts: tuple[Tensor, Tensor, Tensor], labels_BT: Tensor, variant: str) -> Tensor:
    """nll_B by a padded pass with all logits, a log-softmax, and a sum over the passages."""
    ids_BKS, mask_BKS, scores_BK = contexts
    (B, K, S), T = ids_BKS.shape, labels_BT.shape[1]
    labels_RT = labels_BT.repeat_interleave(K, dim=0)
    known_RT = labels_RT != IGNORE
    ids_RX = torch.cat((ids_BKS.flatten(0, 1), labels_RT.where(known_RT, PAD)), dim=1)
    mask_RX = torch.cat((mask_BKS.flatten(0, 1), known_RT.long()), dim=1)
    positions_RX = (mask_RX.cumsum(dim=1) - 1).clamp(min=0)
    logits_RXV = model(input_ids=ids_RX, attention_mask=mask_RX, position_ids=positions_RX, use_cache=False).logits
    log_probs_RTV = logits_RXV[:, S - 1 : S + T - 1].log_softmax(dim=2)
    log_probs_RT = log_probs_RTV.gather(2, labels_RT.where(known_RT, 0).unsqueeze(2)).squeeze(2)
    log_probs_BKT, log_docs_BK = log_probs_RT.view(B, K, T), scores_BK.log_softmax(dim=1)
    known_B1T = (labels_BT != IGNORE).unsqueeze(1)
    if variant == "sequence":
        return -(log_docs_BK + (log_probs_BKT * known_B1T).sum(dim=2)).logsumexp(dim=1)
    return -((log_docs_BK.unsqueeze(2) + log_probs_BKT).logsumexp(dim=1) * known_B1T.squeeze(1)).sum(dim=1)


@torch.inference_mode()
def plain_mixture_beams(model: Any, contexts: tuple[Tensor, Tensor, Tensor], H: int, T: int) -> list[list[int]]:
    """RAG-Token's best answers of T tokens (the end token is left out), with one row and cache per hypothesis.

    As `generate` does it with beams: prompts are repeated before they are read, and caches are copied at every step.
    """
    ids_BKS, mask_BKS, scores_BK = contexts
    B, K, _ = ids_BKS.shape
    ids_QS, mask_QS = (part.flatten(0, 1).repeat_interleave(H, dim=0) for part in (ids_BKS, mask_BKS))
    positions_QS = (mask_QS.cumsum(dim=1) - 1).clamp(min=0)
    log_docs_BK11 = scores_BK.log_softmax(dim=1)[:, :, None, None]
    cache, tokens_BHT = DynamicCache(), torch.zeros(B, H, 0, dtype=torch.long)
    scores_BH = torch.full((B, H), float("-inf"))
    scores_BH[:, 0] = 0
    step = {"input_ids": ids_QS, "position_ids": positions_QS}
    for _ in range(T):
        logits_QV = model(**step, attention_mask=mask_QS, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        log_probs_BKHV = logits_QV.log_softmax(dim=1).view(B, K, H, -1)
        log_probs_BHV = (log_docs_BK11 + log_probs_BKHV).logsumexp(dim=1)
        log_probs_BHV[:, :, END] = float("-inf")
        V = log_probs_BHV.shape[2]
        scores_BH, best_BH = (scores_BH.unsqueeze(2) + log_probs_BHV).flatten(1).topk(H, dim=1)
        beam_BH, token_BH = best_BH // V, best_BH % V
        tokens_BHT = torch.cat(
            (tokens_BHT.gather(1, beam_BH.unsqueeze(2).expand_as(tokens_BHT)), token_BH[..., None]), 2
        )
        rows_BKH = torch.arange(B * K).view(B, K, 1) * H + beam_BH.unsqueeze(1)
        cache.reorder_cache(rows_BKH.flatten())
        mask_QS = torch.cat((mask_QS, mask_QS.new_ones(len(mask_QS), 1)), dim=1)
        step = {
            "input_ids": token_BH.unsqueeze(1).expand(B, K, H).reshape(-1, 1),
            "position_ids": mask_QS.sum(dim=1, keepdim=True) - 1,
        }
    return tokens_BHT[:, 0].tolist()
