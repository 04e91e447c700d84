"""Compare bfloat16 with float32 on 500 questions of the demo, with a small generator trained to answer them.

`benchmarks/components/precision.py` makes the same comparison with the model that `make demo` trains, retrieval included.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from demo_data.config import GeonamesConfig
from demo_data.dataset import make_passages, make_questions
from rag_core.corpus.passages import Passage
from rag_core.model.reader import Answer, DecodingConfig, GeneratorReader
from rag_core.questions.questions import Question
from rag_core.reading.likelihood import Variant
from rag_core.reading.prompt import PromptConfig

pytestmark = pytest.mark.slow
NUMBER, STEPS, BATCH = 500, 500, 25
Examples = list[tuple[Question, list[Passage]]]


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Questions, each with three passages: the gold one, one about the same place, and one about another place."""
    config = GeonamesConfig(num_cities=400, test_cities=20, test_countries=5)
    passages = make_passages(config)
    row_of = {passage.id: row for row, passage in enumerate(passages)}
    questions = sorted(make_questions(config)["train"], key=lambda question: question.id)[::3][:NUMBER]
    assert len(questions) == NUMBER
    golds = [row_of[question.gold_passage_ids[0]] for question in questions]
    others = [(gold + 1, (gold + len(passages) // 2)) for gold in golds]
    return [
        (question, [passages[gold], *(passages[other % len(passages)] for other in pair)])
        for question, gold, pair in zip(questions, golds, others, strict=True)
    ]


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,000 pieces: a small vocabulary, so that training takes seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module")
def reader(examples: Examples) -> GeneratorReader:
    """A BART of 4 million parameters, trained on the questions and their passages until it answers most of them."""
    tokenizer = tokenizer_of([passage.text for _, passages in examples for passage in passages])
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=128,
        dropout=0.0,
        init_std=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=None,
    )
    reader = GeneratorReader(BartForConditionalGeneration(config), tokenizer, PromptConfig(max_context_tokens=64))
    optimizer = torch.optim.AdamW(reader.generator.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        batch = examples[step * BATCH % NUMBER :][:BATCH]
        answers = [question.answers[0] for question, _ in batch]
        questions, golds = [question.question for question, _ in batch], [passages[:1] for _, passages in batch]
        loss = reader.nll(questions, golds, torch.zeros(len(batch), 1), answers, "token").mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.generator.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    reader.generator.eval()
    return reader


def answers_of(reader: GeneratorReader, examples: Examples, variant: Variant, decoding: DecodingConfig) -> list[Answer]:
    scores_BK = 2 * torch.randn(NUMBER, 3, generator=torch.Generator().manual_seed(0))
    scores_BK[:, 0] += 4
    answers = []
    for start in range(0, NUMBER, 50):
        batch = examples[start : start + 50]
        questions, passages = [question.question for question, _ in batch], [passages for _, passages in batch]
        answers += reader.answer_from(
            questions, passages, scores_BK[start : start + 50], variant=variant, decoding=decoding
        )
    return answers


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_bfloat16_finds_the_best_answers_of_float32(
    variant: Variant, reader: GeneratorReader, examples: Examples
) -> None:
    exact, rough = (
        answers_of(reader, examples, variant, DecodingConfig(max_new_tokens=12, precision=precision))
        for precision in ("float32", "bfloat16")
    )
    right = sum(answer.text in question.answers for answer, (question, _) in zip(exact, examples, strict=True))
    assert right > NUMBER // 2, "the generator must have learnt something"
    assert any(a.log_prob != b.log_prob for a, b in zip(exact, rough, strict=True)), "bfloat16 must have been used"
    differing = [(a, b) for a, b in zip(exact, rough, strict=True) if a.text != b.text]
    assert len(differing) <= NUMBER // 100
    for a, b in differing:
        # The answer of bfloat16 is another candidate of float32, and nearly as probable.
        log_prob = {candidate.text: candidate.log_prob for candidate in a.candidates}
        assert a.log_prob - log_prob[b.text] < 0.05
