"""Likelihoods and decoders against Hugging Face's RAG classes, on identical weights, contexts and scores.

docs/correctness.md lists where their classes differ from the paper; these are the cases in which both must agree.

Legend: B questions, K passages per question, S context tokens, T answer tokens, H hypotheses in a beam.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from rag_core.decoding import decode_rag_sequence, decode_rag_token
from rag_core.reading.likelihood import rag_nll
from tests.decoding.test_decoding import answer_of
from tests.support.models.hf_rag import hf_generate, hf_loss, hf_rag
from tests.support.models.tiny_models import random_contexts, tiny_bart, tiny_model

BOS, END = 1, 2
VARIANTS = ("sequence", "token")

pytestmark = pytest.mark.filterwarnings("ignore")


def random_answers(B: int, longest: int, vocab_size: int, seed: int, shortest: int = 1) -> list[list[int]]:
    """Answers of different lengths, end token included, without padding tokens inside (theirs would skip them)."""
    r = random.Random(seed)
    return [[r.randint(3, vocab_size - 1) for _ in range(r.randint(shortest, longest - 1))] + [END] for _ in range(B)]


def padded(answers: list[list[int]]) -> Tensor:
    longest = max(len(answer) for answer in answers)
    return torch.tensor([answer + [-100] * (longest - len(answer)) for answer in answers])


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_of_hugging_face(variant: str, K: int) -> None:
    for seed in range(5):
        generator = tiny_bart(vocab_size=30, seed=seed, dtype=torch.float32)
        contexts = random_contexts(B=6, K=K, S=9, seed=seed, vocab_size=30, dtype=torch.float32)
        answers = random_answers(6, longest=8, vocab_size=30, seed=seed)
        theirs_B = hf_loss(hf_rag(generator, variant), contexts, [[END, *answer] for answer in answers])
        ours_B = rag_nll(generator, *contexts, padded(answers), variant=variant)  # type: ignore[arg-type]
        torch.testing.assert_close(ours_B, theirs_B, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_after_a_forced_first_token_are_those_of_hugging_face_without_its_score(variant: str) -> None:
    for seed in range(5):
        generator = tiny_model("bart-forced", vocab_size=30, seed=seed, dtype=torch.float32)
        contexts = random_contexts(B=6, K=3, S=9, seed=seed, vocab_size=30, dtype=torch.float32)
        answers = random_answers(6, longest=8, vocab_size=30, seed=seed)
        model = hf_rag(generator, variant)
        labels = [[END, BOS, *answer] for answer in answers]
        if variant == "sequence":
            theirs_B = hf_loss(model, contexts, labels, exclude_bos_score=True)
        else:  # In RAG-Token the forced token's factor is the first: Σ_z p(z|q) p(<s>|q,z).
            theirs_B = hf_loss(model, contexts, labels) - hf_loss(model, contexts, [[END, BOS]] * 6)
        ours_B = rag_nll(generator, *contexts, padded(answers), variant=variant)  # type: ignore[arg-type]
        torch.testing.assert_close(ours_B, theirs_B, rtol=1e-5, atol=2e-5)


def beam_cases(number: int) -> list[tuple[Any, tuple[Tensor, Tensor, Tensor], dict[str, Any], int]]:
    """(generator, contexts of 4 questions, beam settings, tokens forced in front) of random kinds."""
    cases = []
    for seed in range(number):
        r = random.Random(seed)
        build = r.choice(["bart", "bart-forced"])
        generator = tiny_model(build, vocab_size=r.choice([9, 20, 40]), seed=seed)
        contexts = random_contexts(B=4, K=r.randint(1, 4), S=7, seed=seed, vocab_size=generator.config.vocab_size)
        num_beams = r.randint(1, 5)
        settings = {
            "num_beams": num_beams,
            "num_return_sequences": num_beams,
            "max_new_tokens": r.randint(3, 9),
            "length_penalty": r.choice([0.0, 1.0, -0.5, 2.0]),
            "early_stopping": r.choice([False, True, "never"]),
        }
        cases.append((generator, contexts, settings, int(build == "bart-forced")))
    return cases


def test_rag_token_decodes_the_sequences_of_hugging_face() -> None:
    decoded = []
    for generator, contexts, settings, forced in beam_cases(60):
        ours = decode_rag_token(generator, *contexts, **settings)
        # Their RAG-Token does not read max_new_tokens, but the maximum length, start token included.
        theirs = hf_generate(
            hf_rag(generator, "token"),
            contexts,
            **{name: value for name, value in settings.items() if name != "max_new_tokens"},
            max_length=1 + settings["max_new_tokens"],
        )
        expected = [answer_of(row[forced:], END) for row in theirs]
        assert [h.token_ids for hypotheses in ours for h in hypotheses] == expected
        decoded += [tuple(answer) for answer in expected[:: settings["num_beams"]]]
    assert len(decoded) == 240
    assert len(set(decoded)) > 100, "weights must give different answers"


def without_padding(contexts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    shortest = int(contexts[1].sum(dim=2).min())
    return contexts[0][:, :, :shortest], contexts[1][:, :, :shortest], contexts[2]


def with_tokens_of_released_bart(generator: Any) -> None:
    """Set <s> to 0 and <pad> to 1: with padding 0, their beam search pads with end tokens and scores them.

    Their score also leaves out padding inside answers, a first token that happens to be <s>, and the document's
    probability if an answer is only its end token; so all of these are suppressed.
    """
    settings = generator.generation_config
    for place in (generator.config, settings):
        place.bos_token_id, place.pad_token_id = 0, 1
    settings.forced_bos_token_id = None if settings.forced_bos_token_id is None else 0
    settings.suppress_tokens, settings.begin_suppress_tokens = [1], [0, END]


def test_thorough_rag_sequence_decodes_the_sequences_of_hugging_face() -> None:
    decoded = []
    for generator, contexts, settings, forced in beam_cases(60):
        with_tokens_of_released_bart(generator)
        contexts = without_padding(contexts)
        settings |= {"num_return_sequences": 1}
        theirs = hf_generate(hf_rag(generator, "sequence"), contexts, **settings)
        ours = decode_rag_sequence(generator, *contexts, **settings)
        # Their batch is padded to its longest answer; an answer that was cut off has no end token before the padding.
        expected = [[token for token in answer_of(row[forced:], END) if token != 1] for row in theirs]
        assert [h.token_ids for (h,) in ours] == expected
        decoded += [tuple(answer) for answer in expected]
    assert len(decoded) == 240
    assert len(set(decoded)) > 100, "weights must give different answers"
