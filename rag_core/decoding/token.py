"""RAG-Token decoding: one beam over the mixture of passages.

Legend: B questions, K passages per question, S context tokens, H hypotheses in a beam, T answer tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rag_core.decoding.beam_search import beam_search
from rag_core.decoding.beams import Beams, BeamSettings, EarlyStopping, check_decoding
from rag_core.decoding.hypothesis import Hypothesis
from rag_core.generators.decoding_mode import decoding_mode
from rag_core.generators.generation_tokens import GenerationTokens
from rag_core.generators.kinds import as_generator
from rag_core.reading.likelihood import doc_log_probs


def decode_rag_token(
    generator: Any,
    input_ids_BKS: Tensor,
    attention_mask_BKS: Tensor,
    doc_scores_BK: Tensor,
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 0.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    use_cache: bool = True,
) -> list[list[Hypothesis]]:
    """Answers that beam search finds under p(a|q) = Π_t Σ_z p(z|q) p(a_t | q, z, a_<t), best first.

    Args:
        generator: a transformers encoder-decoder or causal language model; decoded in evaluation mode, left in the
            mode it was in.
        input_ids_BKS: int64 token ids of the contexts (question and passage), padded on either side.
        attention_mask_BKS: 1 for real tokens, 0 for padding; at least one real token in each context.
        doc_scores_BK: the retriever's scores before the softmax; −inf marks an absent passage.
        num_beams, max_new_tokens, length_penalty, early_stopping: as in `BeamSettings`.
        num_return_sequences: answers per question at most, up to num_beams.
        use_cache: False runs the decoder over the whole answer at every step: slower, with the same result.

    Returns:
        For each question its distinct answers; `Hypothesis.doc_log_posterior` has the shape (T, K).

    Raises:
        ConfigError: a setting is out of range, or the generator writes no text or lacks a special token.
        ValueError: shapes do not fit, or a question has no finite document score.

    Source: Lewis et al. 2020 (arXiv 2005.11401), section 2.5, "RAG-Token".
    """
    settings = BeamSettings(num_beams, max_new_tokens, length_penalty, early_stopping)
    check_decoding(generator, input_ids_BKS, attention_mask_BKS, doc_scores_BK, settings, num_return_sequences)
    with decoding_mode(generator):
        contexts = input_ids_BKS.flatten(0, 1), attention_mask_BKS.flatten(0, 1)
        decoder = as_generator(generator).passage_decoder(*contexts, use_cache=use_cache)
        # Several end tokens may end the same answer, so distinct answers may need that many times more sequences.
        wanted = num_return_sequences * len(decoder.tokens.ends)
        beams = beam_search(decoder, doc_log_probs(doc_scores_BK), settings, wanted)
        return _hypotheses(beams, decoder.tokens, num_return_sequences)


def _hypotheses(beams: Beams, special: GenerationTokens, limit: int) -> list[list[Hypothesis]]:
    posteriors_BHTK = beams.doc_log_posteriors_BHTK.cpu()
    tokens, lengths = beams.tokens_BHT.tolist(), beams.lengths_BH.tolist()
    log_probs, scores = beams.log_probs_BH.tolist(), beams.scores_BH.tolist()
    answers: list[list[Hypothesis]] = []
    for b in range(len(tokens)):
        # Keyed by the answer: two end tokens may end the same answer. The better sequence comes first and is kept.
        best: dict[tuple[int, ...], Hypothesis] = {}
        for h, log_prob in enumerate(log_probs[b]):
            generated = tokens[b][h][: lengths[b][h]]
            token_ids = special.strip(generated)
            if log_prob > float("-inf") and tuple(token_ids) not in best and len(best) < limit:
                posterior_TK = posteriors_BHTK[b, h, : len(token_ids)].clone()
                best[tuple(token_ids)] = Hypothesis(
                    token_ids, log_prob, scores[b][h], special.ended(generated), posterior_TK
                )
        answers.append(list(best.values()))
    return answers
