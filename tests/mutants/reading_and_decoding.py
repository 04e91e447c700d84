"""Faults in computations: likelihoods, special tokens, decoders, contexts, encoders."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

LIKELIHOOD = "tests/reading/test_likelihood.py"
PROPERTIES = "tests/reading/test_likelihood_properties.py"
DECODING = "tests/decoding/test_decoding.py"
INVARIANCE = "tests/decoding/test_invariance.py"
FAMILIES = "tests/decoding/test_generator_families.py"
HF = "tests/model/test_hf_equality.py"
LOSS = "rag_core/reading/likelihood.py"
SEARCH = "rag_core/decoding/beam_search.py"
DECODER = "rag_core/generators/encoder_decoder/passage_decoder.py"
SEQUENCE = "rag_core/decoding/sequence.py"
SCORING = "rag_core/decoding/candidate_scoring.py"
SHARED = "rag_core/generators/encoder_decoder/shared_attention.py"
LABELS = "rag_core/generators/token_log_probs.py"
ENCODER_DECODER = "rag_core/generators/encoder_decoder/generator.py"
MODE = "rag_core/generators/decoding_mode.py"
SLOTS = "rag_core/generators/slots.py"
GROUPS = "rag_core/generators/encoder_decoder/context_encoder.py"
TOKENS = "rag_core/generators/generation_tokens.py"
CONTEXTS = "rag_core/reading/contexts.py"
ENCODER = "rag_core/embeddings/text_encoder.py"

READING_AND_DECODING = (
    # Likelihoods
    Mutant("sign of the loss", LOSS, "return -log_likelihood_B.to(", "return log_likelihood_B.to(", LIKELIHOOD),
    Mutant(
        "sign of the documents' scores",
        LOSS,
        "return torch.log_softmax(at_least_float32(doc_scores_BK), dim=1)",
        "return torch.log_softmax(-at_least_float32(doc_scores_BK), dim=1)",
        LIKELIHOOD,
    ),
    Mutant(
        "documents' probabilities added once a token in RAG-Sequence",
        LOSS,
        "answer_BK = log_probs_BKT.masked_fill",
        "answer_BK = (log_probs_BKT + log_docs_BK.unsqueeze(2)).masked_fill",
        LIKELIHOOD,
    ),
    Mutant(
        "ignored positions counted in RAG-Sequence",
        LOSS,
        "log_probs_BKT.masked_fill(ignored_BT.unsqueeze(1), 0.0).sum(dim=2)",
        "log_probs_BKT.sum(dim=2)",
        LIKELIHOOD,
    ),
    Mutant(
        "ignored positions counted in RAG-Token",
        LOSS,
        "log_docs_BK).masked_fill(ignored_BT, 0.0).sum(dim=1)",
        "log_docs_BK).sum(dim=1)",
        LIKELIHOOD,
    ),
    Mutant(
        "labels one position late",
        LOSS,
        "labels_BKT = labels_BT.masked_fill(ignored_BT, 0)",
        "labels_BKT = labels_BT.roll(1, 1).masked_fill(ignored_BT.roll(1, 1), 0)",
        LIKELIHOOD,
    ),
    Mutant(
        "no floor under log-probabilities",
        LOSS,
        "log_probs_BKT = log_probs_BKT.clamp(min=_FLOOR)",
        "log_probs_BKT = log_probs_BKT",
        PROPERTIES,
    ),
    Mutant(
        "sign of the gradient at the label",
        LABELS,
        "at_label_N1 = weight_N1 * rest_N1",
        "at_label_N1 = -weight_N1 * rest_N1",
        LIKELIHOOD,
    ),
    Mutant("no normaliser in the gradient", LABELS, ".reshape(-1, 1) / total_N1", ".reshape(-1, 1)", LIKELIHOOD),
    Mutant(
        "half precision accumulated in half precision",
        LABELS,
        "return (at_least_float32(logits_NV) - top_N1).exp_()",
        "return (logits_NV - top_N1).exp_()",
        LIKELIHOOD,
    ),
    Mutant(
        "greatest logit not subtracted",
        LABELS,
        "top_N1 = logits_NV.amax(dim=1, keepdim=True)",
        "top_N1 = torch.zeros_like(logits_NV[:, :1])",
        LIKELIHOOD,
    ),
    Mutant(
        "padding of contexts attended to in the loss",
        ENCODER_DECODER,
        "                    attention_mask=attention_mask_NS,\n",
        "",
        LIKELIHOOD,
    ),
    Mutant(
        "passages' rows mixed up in the loss",
        LOSS,
        "labels_BT.repeat_interleave(K, dim=0)",
        "labels_BT.repeat(K, 1)",
        LIKELIHOOD,
    ),
    # Start, end, forced and suppressed tokens
    Mutant(
        "forced first token left out",
        TOKENS,
        "return (start,) if first is None else (start, first)",
        "return (start,)",
        f"{FAMILIES} {HF}",
    ),
    Mutant(
        "forced first token not counted as generated",
        TOKENS,
        "return max(0, len(self.prompt) - 1)",
        "return 0",
        f"{FAMILIES} {HF}",
    ),
    Mutant(
        "forced end token ignored",
        TOKENS,
        "forced_end=forced_end[0] if forced_end else None",
        "forced_end=None",
        f"{FAMILIES} {HF}",
    ),
    Mutant(
        "bad words ignored",
        TOKENS,
        " + bad_tokens,\n            suppressed_first",
        ",\n            suppressed_first",
        FAMILIES,
    ),
    Mutant(
        "tokens suppressed at the beginning ignored",
        TOKENS,
        'suppressed_first=_as_tuple(getattr(generation, "begin_suppress_tokens", None))',
        "suppressed_first=()",
        HF,
    ),
    Mutant(
        "ignored labels read as tokens",
        TOKENS,
        "labels_NT[:, :-1].where(labels_NT[:, :-1] >= 0, self.pad)",
        "labels_NT[:, :-1].abs() % 7",
        LIKELIHOOD,
    ),
    Mutant("end token kept in answers", TOKENS, "return generated_ids[:-1] if", "return generated_ids if", DECODING),
    Mutant(
        "only the first of several end tokens used",
        TOKENS,
        'ends = _as_tuple(_find(generator, "eos_token_id"))',
        'ends = _as_tuple(_find(generator, "eos_token_id"))[:1]',
        DECODING,
    ),
    # Beam search
    Mutant(
        "end token forgotten: nothing ends before the limit",
        SEARCH,
        "else torch.isin(token_AC, self.ends)",
        "else torch.zeros_like(token_AC, dtype=torch.bool)",
        DECODING,
    ),
    Mutant("ended hypotheses below the best H join the pool", SEARCH, "joins_AC[:, self.H :] = False", "pass", HF),
    Mutant("H candidates instead of 2·H", SEARCH, "(1 + len(tokens.ends)) * H", "H", HF),
    Mutant(
        "length counted one too short",
        SEARCH,
        "return t + 1 + self.generation",
        "return max(t, 1) + self.generation",
        f"{DECODING} {HF}",
    ),
    Mutant(
        "finished questions keep collecting hypotheses",
        SEARCH,
        "ended_AC & self.searching_A.unsqueeze(1)",
        "ended_AC",
        f"{INVARIANCE} {HF}",
    ),
    Mutant(
        "search stops as soon as the pool is full",
        SEARCH,
        "if settings.early_stopping is True or self.H == 1:",
        "if True:",
        HF,
    ),
    Mutant("early stopping ignored", SEARCH, "settings.early_stopping is True or self.H == 1", "False", HF),
    Mutant('"never" taken for False', SEARCH, 'settings.early_stopping == "never" and penalty > 0', "False", HF),
    Mutant(
        "the bound of a longer answer ignores its length",
        SEARCH,
        "settings.max_new_tokens if penalty > 0 else length) **",
        "length) **",
        "tests/reading/test_fast_paths.py",
    ),
    Mutant(
        "normaliser of the softmax left out",
        SEARCH,
        " - normalisers_AKW[rows_A1, :, beam_AC]",
        "",
        DECODING,
    ),
    Mutant("posterior not normalised", SEARCH, "joint_ACK - mixture_AC.unsqueeze(2)", "joint_ACK", DECODING),
    Mutant(
        "self-attention to another hypothesis's past",
        SEARCH,
        "parent_AW.repeat_interleave(K, dim=0)).unflatten",
        "(parent_AW * 0).repeat_interleave(K, dim=0)).unflatten",
        DECODING,
    ),
    Mutant(
        "answers returned in the order in which questions finished",
        SEARCH,
        "[order_B] for name",
        "for name",
        INVARIANCE,
    ),
    Mutant(
        "suppressed tokens generated",
        SEARCH,
        'ranked_AWV.index_fill_(2, self.suppressed_first if t == 0 else self.suppressed, float("-inf"))',
        "pass",
        FAMILIES,
    ),
    # The decoder's passes
    Mutant(
        "padding of contexts attended to in decoding",
        SHARED,
        "mask_NS[:, None, None].bool()",
        "mask_NS[:, None, None].bool() | True",
        DECODING,
    ),
    Mutant(
        "contexts encoded with their padding",
        GROUPS,
        "attention_mask=attention_mask_NS[part], return_dict=True",
        "return_dict=True",
        DECODING,
    ),
    Mutant(
        "candidates scored under other contexts",
        SCORING,
        "decoder.restart(contexts_N)",
        "decoder.restart(contexts_N * 0)",
        DECODING,
    ),
    Mutant(
        "finished contexts stay, and others are dropped",
        SHARED,
        "(keys[contexts_n], values[contexts_n])",
        "(keys[: len(contexts_n)], values[: len(contexts_n)])",
        DECODING,
    ),
    Mutant("dropout on while decoding", MODE, "    generator.eval()\n", "", DECODING),
    Mutant(
        "without a cache the prompt is left out",
        DECODER,
        "torch.cat((past_NWT, tokens_NW.unsqueeze(2)), dim=2)",
        "torch.cat((past_NWT[:, :, 1:], tokens_NW.unsqueeze(2)), dim=2)",
        INVARIANCE,
    ),
    # RAG-Sequence
    Mutant("fast taken for thorough", SEQUENCE, 'if mode == "thorough":', "if True:", DECODING),
    Mutant("a candidate scored with the prefix of another", SCORING, "[before[prefix[:-1]] for", "[0 for", DECODING),
    Mutant("candidates dropped that could still win", SCORING, "threshold - _MARGIN", "threshold + 1", DECODING),
    Mutant(
        "all contexts of a group mapped to its first",
        GROUPS,
        "[order_N.argsort()]",
        "[order_N.argsort() * 0]",
        DECODING,
    ),
    Mutant("a hypothesis does not see its own token", SLOTS, "torch.eye(W, dtype", "torch.zeros(W, W, dtype", DECODING),
    Mutant("worst answers first", SEQUENCE, "argsort(descending=True", "argsort(descending=False", DECODING),
    Mutant(
        "documents' probabilities left out of the ranking",
        SEQUENCE,
        "mixture_C = marginalize(log_probs_CK, log_docs_CK)",
        "mixture_C = marginalize(log_probs_CK, log_docs_CK * 0)",
        DECODING,
    ),
    # Contexts
    Mutant(
        "the question is cut, not the passage",
        CONTEXTS,
        "dropped = set(inside[len(inside) - excess :])",
        "dropped = set(range(len(ids) - excess, len(ids)))",
        "tests/reading/test_contexts.py",
    ),
    Mutant("cut contexts not counted", CONTEXTS, "            cut += 1\n", "", "tests/reading/test_contexts.py"),
    # Encoders
    Mutant(
        "not normalised",
        ENCODER,
        "if self.settings.normalize else vectors_BD",
        "if False else vectors_BD",
        "tests/embeddings/test_text_encoder.py tests/embeddings/test_sentence_transformers_folders.py",
    ),
    Mutant(
        "padding in the mean",
        ENCODER,
        "(states_BSD * mask_BS1).sum(1)",
        "states_BSD.sum(1)",
        "tests/embeddings/test_text_encoder.py tests/embeddings/test_sentence_transformers_folders.py",
    ),
)
