"""Small models of ours, checkpoints of Hugging Face's RAG classes, tokenizers, and the losses of both.

Legend: B questions, K passages per question, S context tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertTokenizer,
    DPRConfig,
    DPRQuestionEncoder,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedTokenizerFast,
    RagTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from rag_core.corpus.passages import Passage
from rag_core.embeddings.encoder_settings import EncoderSettings
from rag_core.embeddings.text_encoder import TextEncoder
from rag_core.model.rag_model import RagModel
from rag_core.model.reader import without_unused_pooler
from rag_core.model.settings import ModelSettings
from rag_core.reading.likelihood import Variant, rag_nll

CLASSES: dict[Variant, str] = {"sequence": "RagSequenceForGeneration", "token": "RagTokenForGeneration"}
FAMILIES = ("bart", "t5", "bert2bert")
DPR = EncoderSettings(pooling="dpr", max_tokens=32, title_separator=" [SEP] ")
WORDS = "a in is of the city country river which what Lyon Oslo France Norway Rhone / // ? . :"
PAD, START, END = 0, 1, 2
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS.split()]
QUESTIONS = ["which country is Lyon in ?", "what river is in Oslo ?"]
PASSAGES = [
    [Passage("1", "Lyon", "Lyon is a city in France ."), Passage("2", "", "the Rhone"), Passage("3", "Oslo", "a city")],
    [Passage("4", '"Oslo"', "Oslo is a city"), Passage("5", "Lyon", "the river"), Passage("6", "", "in Norway .")],
]
# Every passage has a title: with an empty one, Hugging Face collapses the spaces around it and we do not.
TITLED = [[Passage("1", "Lyon", "Lyon is a city in France."), Passage("2", '"Oslo"', "A city.")] for _ in QUESTIONS]


def dpr_encoder(projection_dim: int = 0) -> Any:
    torch.manual_seed(0)
    config = DPRConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        projection_dim=projection_dim,
        initializer_range=0.3,
    )
    return DPRQuestionEncoder(config).eval()


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=48,
        initializer_range=0.3,
        **changes,
    )


def generator_of(family: str) -> Any:
    """Random weights, large enough that contexts and answers differ in probability; the head is tied to embeddings."""
    torch.manual_seed(1)
    V = len(VOCABULARY)
    if family == "bart":
        config: Any = BartConfig(
            vocab_size=V,
            d_model=16,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            pad_token_id=PAD,
            bos_token_id=START,
            eos_token_id=END,
            decoder_start_token_id=END,
            forced_eos_token_id=None,
            init_std=0.3,
        )
        return BartForConditionalGeneration(config).eval()
    if family == "t5":
        config = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, eos_token_id=END)
        config.decoder_start_token_id = PAD
        return T5ForConditionalGeneration(config).eval()
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        bert_config(), bert_config(), pad_token_id=PAD, decoder_start_token_id=START, eos_token_id=END
    )
    return without_unused_pooler(EncoderDecoderModel(config).eval())


def question_tokenizer() -> Any:
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, do_lower_case=False)


def generator_tokenizer() -> Any:
    inner = Tokenizer(models.WordLevel({word: at for at, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]", bos_token="[CLS]"
    )


def letter_tokenizer() -> Any:
    """Every character is a token, spaces too, so that no difference between two texts is lost."""
    letters = ["[PAD]", "[UNK]", *(chr(code) for code in range(32, 127))]
    inner = Tokenizer(models.WordLevel({letter: at for at, letter in enumerate(letters)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]")


def make_model(
    family: str = "bart", encoder: Any = None, encoder_settings: EncoderSettings = DPR, **settings: Any
) -> Any:
    """A RAG model of ours, by default with a DPR question encoder."""
    question_encoder = TextEncoder(encoder or dpr_encoder(), question_tokenizer(), encoder_settings)
    settings = {"variant": "token", "num_docs": 3, "document_encoder_fingerprint": "f" * 64, **settings}
    return RagModel(question_encoder, generator_of(family), generator_tokenizer(), ModelSettings(**settings)).eval()


def make_hf_checkpoint(folder: Path, hf_class: str = "RagTokenForGeneration", family: str = "bart") -> Any:
    """A checkpoint made by Hugging Face's classes alone; returns their model."""
    parts = folder.parent / f"{folder.name}-parts"
    dpr_encoder(projection_dim=8).save_pretrained(parts / "question_encoder")
    generator_of(family).save_pretrained(parts / "generator")
    model = getattr(transformers, hf_class).from_pretrained_question_encoder_generator(
        str(parts / "question_encoder"), str(parts / "generator"), n_docs=3, max_combined_length=40
    )
    model.save_pretrained(folder)
    RagTokenizer(question_tokenizer(), generator_tokenizer()).save_pretrained(folder)
    return model.eval()


def load_hf(folder: Path, hf_class: str) -> Any:
    """Load Hugging Face's model from a folder that must hold all of its weights and no others."""
    model, report = getattr(transformers, hf_class).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def contexts_and_answers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[list[int]]]:
    """input_ids_BKS, attention_mask_BKS, doc_scores_BK and answers of different lengths, at least two tokens each.

    Hugging Face's RAG-Sequence loses the documents' scores in answers of one token, end included.
    """
    g = torch.Generator().manual_seed(seed)
    B, K, S = 4, 3, 9
    input_ids_BKS = torch.randint(4, len(VOCABULARY), (B, K, S), generator=g)
    attention_mask_BKS = (torch.arange(S) < torch.randint(3, S + 1, (B, K, 1), generator=g)).long()
    doc_scores_BK = 2 * torch.randn(B, K, generator=g)
    answers = [torch.randint(4, len(VOCABULARY), (length,), generator=g).tolist() for length in (1, 2, 5, 3)]
    return input_ids_BKS * attention_mask_BKS, attention_mask_BKS, doc_scores_BK, [[*answer, END] for answer in answers]


def pad(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def our_loss(model: RagModel, variant: Variant) -> torch.Tensor:
    input_ids_BKS, attention_mask_BKS, doc_scores_BK, answers = contexts_and_answers()
    labels_BT = pad(answers, -100)
    with torch.no_grad():
        return rag_nll(model.generator, input_ids_BKS, attention_mask_BKS, doc_scores_BK, labels_BT, variant=variant)


def their_loss(hf_model: Any) -> torch.Tensor:
    """Their labels are the decoder's inputs: the start token is first and is not scored."""
    input_ids_BKS, attention_mask_BKS, doc_scores_BK, answers = contexts_and_answers()
    config = hf_model.config.generator
    labels_BT = pad([[config.decoder_start_token_id, *answer] for answer in answers], config.pad_token_id)
    with torch.no_grad():
        return hf_model(
            context_input_ids=input_ids_BKS.flatten(0, 1),
            context_attention_mask=attention_mask_BKS.flatten(0, 1),
            doc_scores=doc_scores_BK,
            labels=labels_BT,
            reduce_loss=False,
        ).loss


def assert_equal_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    first_weights, second_weights = first.state_dict(), second.state_dict()
    assert first_weights.keys() == second_weights.keys()
    for name, value in first_weights.items():
        assert torch.equal(value, second_weights[name]), name


def tied_groups(module: torch.nn.Module) -> set[frozenset[str]]:
    """Groups of names of parameters that share memory."""
    names: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}
