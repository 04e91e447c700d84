"""Fast paths do not change results: packed weights, groups of contexts, candidates that are dropped early.

Legend: B questions, K passages per question, N contexts, S context tokens, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rag_core.cpu.packed_linears import folded_logits_bias, packed_linears, trainable_linears
from rag_core.decoding import decode_rag_sequence, decode_rag_token
from rag_core.decoding.mixture import best_of
from rag_core.generators.encoder_decoder.context_encoder import encode_contexts
from rag_core.generators.encoder_decoder.passage_decoder import EncoderDecoderPassageDecoder
from rag_core.generators.encoder_decoder.shared_attention import can_share
from rag_core.generators.grouping import groups_by_width
from rag_core.generators.kinds import as_generator
from rag_core.reading.likelihood import rag_nll
from tests.support.models.tiny_models import ALL_FAMILIES, random_contexts, tiny_bart, tiny_model


def test_fewer_answers_of_rag_sequence_are_the_first_of_more() -> None:
    fewer_candidates = 0
    for seed in range(30):
        model = tiny_bart(vocab_size=12, seed=seed)
        contexts = random_contexts(B=3, K=4, S=7, seed=seed, vocab_size=12)
        settings = {"num_beams": 4, "max_new_tokens": 6}
        some = decode_rag_sequence(model, *contexts, num_return_sequences=1, **settings)
        more = decode_rag_sequence(model, *contexts, num_return_sequences=4, **settings)
        for (single,), several in zip(some, more, strict=True):
            assert single.token_ids == several[0].token_ids
            assert single.log_prob == pytest.approx(several[0].log_prob, abs=1e-9)
            torch.testing.assert_close(single.doc_log_posterior, several[0].doc_log_posterior)
            fewer_candidates += len(several) > 1
    assert fewer_candidates > 60, "there must be other answers to leave out"


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0])
def test_fewer_answers_of_rag_token_are_the_first_of_more(length_penalty: float, early_stopping: Any) -> None:
    several_answers = 0
    for seed in range(12):
        model = tiny_bart(vocab_size=12, seed=seed)
        contexts = random_contexts(B=3, K=4, S=7, seed=seed, vocab_size=12)
        settings = {"length_penalty": length_penalty, "early_stopping": early_stopping}
        by_number = {
            requested: decode_rag_token(
                model, *contexts, num_beams=4, max_new_tokens=6, num_return_sequences=requested, **settings
            )
            for requested in (1, 2, 4)
        }
        for one, two, four in zip(*by_number.values(), strict=True):
            assert [hypothesis.token_ids for hypothesis in (*one, *two)] == [
                hypothesis.token_ids for hypothesis in (*four[:1], *four[:2])
            ]
            for some, all_of_them in zip((*one, *two), (*four[:1], *four[:2]), strict=True):
                assert some.log_prob == pytest.approx(all_of_them.log_prob, abs=1e-9)
                torch.testing.assert_close(some.doc_log_posterior, all_of_them.doc_log_posterior)
            several_answers += len(four) > 1
    assert several_answers > 24, "there must be other answers to leave out"


@pytest.mark.parametrize("decode", [decode_rag_sequence, decode_rag_token])
def test_answers_that_cannot_win_are_not_read_to_their_end(decode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    usual = EncoderDecoderPassageDecoder.step

    def counted(self: EncoderDecoderPassageDecoder, tokens_NW: torch.Tensor, parents_NW: torch.Tensor) -> torch.Tensor:
        rows.append(tokens_NW.numel())
        return usual(self, tokens_NW, parents_NW)

    monkeypatch.setattr(EncoderDecoderPassageDecoder, "step", counted)
    read = []
    for requested in (1, 4):
        rows.clear()
        for seed in range(10):
            model, contexts = tiny_bart(vocab_size=12, seed=seed), random_contexts(3, 4, 7, seed, vocab_size=12)
            decode(model, *contexts, num_beams=4, max_new_tokens=6, num_return_sequences=requested)
        read.append(sum(rows))
    assert read[0] < 0.95 * read[1], f"decoder rows for one answer and for four: {read}"


def test_only_led_copies_its_contexts_for_every_hypothesis() -> None:
    shared = {family for family in ALL_FAMILIES if can_share(tiny_model(family, vocab_size=12).get_decoder())}
    assert shared == set(ALL_FAMILIES) - {"led"}


def test_the_best_of_blocks_are_the_best_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    for places in (5, 4096, 20_011):
        values_AF = torch.randn(3, places, generator=random)
        values_AC, found_AC = best_of(values_AF, 5)
        assert torch.equal(values_AC, values_AF.topk(5, dim=1).values)
        assert torch.equal(values_AF.gather(1, found_AC), values_AC)


def test_groups_hold_every_row_once_widest_first() -> None:
    widths = [int(width) for width in torch.randint(1, 200, (97,), generator=torch.Generator().manual_seed(1))]
    groups = groups_by_width(widths)
    assert sorted(row for rows in groups for row in rows) == list(range(97))
    assert len(groups) > 3
    firsts = [widths[rows[0]] for rows in groups]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_contexts_encoded_in_groups_equal_contexts_encoded_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rag_core.generators.grouping.MIN_GROUP_TOKENS", 1)
    model = tiny_model(family, vocab_size=20)
    ids_BKS, mask_BKS, _ = random_contexts(B=3, K=3, S=16, seed=2, vocab_size=20)
    states_NSD = encode_contexts(model, ids_BKS.flatten(0, 1), mask_BKS.flatten(0, 1))
    for ids_S, mask_S, states_SD in zip(ids_BKS.flatten(0, 1), mask_BKS.flatten(0, 1), states_NSD, strict=True):
        length = int(mask_S.sum())
        alone_1SD = model.get_encoder()(input_ids=ids_S[None, :length], attention_mask=mask_S[None, :length])[0]
        torch.testing.assert_close(states_SD[:length], alone_1SD[0])


@pytest.mark.parametrize("variant", ["sequence", "token"])
@pytest.mark.parametrize("family", ["bart", "t5", "bert2bert"])
def test_gradients_with_onednn_equal_those_without(family: str, variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family, vocab_size=30, dtype=torch.float32)
    contexts = random_contexts(B=3, K=2, S=9, seed=3, vocab_size=30, dtype=torch.float32)
    labels_BT = torch.tensor([[5, 6, 2, -100], [7, 2, -100, -100], [8, 9, 10, 2]])
    gradients = []
    for without in (False, True):
        if without:
            monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        model.zero_grad()
        rag_nll(model, *contexts, labels_BT, variant=variant).sum().backward()
        gradients.append(
            {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_in_bfloat16_a_token_is_scored_without_seeing_later_ones(family: str) -> None:
    model = tiny_model(family, vocab_size=12, dtype=torch.float32)
    ids_BKS, mask_BKS, _ = random_contexts(B=3, K=1, S=7, seed=1, vocab_size=12)
    labels_NT = torch.tensor([[5, 6, 7, 8, 9, 10]] * 3)
    others_NT = labels_NT.clone()
    others_NT[:, 3] = 4
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        one_NT, other_NT = (
            as_generator(model).answer_log_probs(ids_BKS[:, 0], mask_BKS[:, 0], labels)[0]
            for labels in (labels_NT, others_NT)
        )
    assert torch.equal(one_NT[:, :3], other_NT[:, :3])
    assert not torch.equal(one_NT[:, 3:], other_NT[:, 3:])


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_logits_bias_added_by_the_head_gives_the_same_logits_and_goes_back_to_its_place(family: str) -> None:
    model = tiny_model(family, vocab_size=12)
    model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids, decoder_input_ids=ids).logits
    with folded_logits_bias(model), folded_logits_bias(model):
        torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected)
    with pytest.raises(IndexError), folded_logits_bias(model):
        model(input_ids=ids, decoder_input_ids=ids + 12)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    torch.testing.assert_close(model(input_ids=ids, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (1, 1, 6)])
def test_packed_and_trainable_layers_multiply_as_pytorch_does(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias))
    inputs = torch.randn(shape)
    expected = layer(inputs)
    with trainable_linears(layer):
        torch.testing.assert_close(layer(inputs), expected)
    with packed_linears(layer), packed_linears(layer), torch.inference_mode():
        torch.testing.assert_close(layer(inputs), expected)
        layer[0].weight.fill_(0.0)
        torch.testing.assert_close(layer(inputs), expected, msg="weights were packed before")
    assert "forward" not in vars(layer[0]), "the layer's own forward pass is back"
