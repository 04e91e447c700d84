"""A decoder-only model, from random weights, learns to copy from the right passage, and to find that passage.

Passages say "entity relation value value". A question names the entity, and the relation by a word of its own; nobody
says which word means which relation. The generator first learns to read single passages. Then question encoder and
generator learn end to end, from answers alone. Values are drawn anew for every batch, so nothing can be learnt by
heart, and the entities of the tests occur in no question of the training end to end.

Legend: B questions, K passages per question, N passages, S context tokens, T answer tokens, D embedding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rag_core.decoding import decode_rag_sequence, decode_rag_token
from rag_core.reading.likelihood import Variant, rag_nll

ENTITIES, TRAINED, RELATIONS, VALUES = 40, 32, 4, 24
END, ASK, ENTITY = 2, 1, 3
RELATION, WORD = ENTITY + ENTITIES, ENTITY + ENTITIES + RELATIONS
VALUE = WORD + RELATIONS
K, D, SCALE = 4, 32, 8.0
DECODE: dict[Variant, Any] = {"sequence": decode_rag_sequence, "token": decode_rag_token}


class World(nn.Module):
    """Passages with fixed vectors, and a question encoder that knows entities but not the words for relations."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.generator, self.draws = generator, draws
        unit = nn.functional.normalize
        self.entities_ED = unit(torch.randn(ENTITIES, D, generator=draws), dim=1)
        relations_RD = unit(torch.randn(RELATIONS, D, generator=draws), dim=1)
        self.vectors_ND = (self.entities_ED[:, None] + 0.5 * relations_RD).flatten(0, 1)
        self.words_RD = nn.Parameter(0.05 * torch.randn(RELATIONS, D, generator=draws))
        names = torch.cartesian_prod(torch.arange(ENTITIES), torch.arange(RELATIONS))
        self.names_N2 = names + torch.tensor([ENTITY, RELATION])

    def passages(self) -> Tensor:
        """All passages, with new values, shape (N, 4)."""
        values_N2 = torch.randint(VALUE, VALUE + VALUES, (len(self.names_N2), 2), generator=self.draws)
        return torch.cat((self.names_N2, values_N2), dim=1)

    def questions(self, B: int, entities: int) -> tuple[Tensor, Tensor]:
        """Random questions about the first `entities` entities: entity and relation."""
        entity_B = torch.randint(0, entities, (B,), generator=self.draws)
        return entity_B, torch.randint(0, RELATIONS, (B,), generator=self.draws)

    def retrieved(self, entity_B: Tensor, relation_B: Tensor) -> tuple[Tensor, Tensor]:
        """The best passages' rows, and their scores, differentiable in the question encoder's words."""
        query_BD = self.entities_ED[entity_B] + self.words_RD[relation_B]
        scores_BN = SCALE * query_BD @ self.vectors_ND.T
        rows_BK = scores_BN.topk(K, dim=1).indices
        return rows_BK, scores_BN.gather(1, rows_BK)

    def contexts(self, passages_BKS: Tensor, entity_B: Tensor, relation_B: Tensor) -> tuple[Tensor, Tensor]:
        """Passage and question in one row, and its mask."""
        question_B3 = torch.stack((torch.full_like(entity_B, ASK), WORD + relation_B, ENTITY + entity_B), dim=1)
        ids_BKS = torch.cat((passages_BKS, question_B3[:, None].expand(-1, passages_BKS.shape[1], -1)), dim=2)
        return ids_BKS, torch.ones_like(ids_BKS)


def labels_of(tokens_BT: Tensor) -> Tensor:
    return nn.functional.pad(tokens_BT, (0, 1), value=END)


def steps(model: nn.Module, groups: list[dict[str, Any]], losses: Iterator[Tensor]) -> None:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    for loss in losses:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def reader() -> Any:
    """A Llama that has learnt to read one passage: it writes out passages, then only their values."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VALUE + VALUES,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=ASK,
            eos_token_id=END,
        )
        world = World(LlamaForCausalLM(config))

    def losses() -> Iterator[Tensor]:
        for step in range(200):
            entity_B, relation_B = world.questions(64, ENTITIES)
            gold_BS = world.passages()[entity_B * RELATIONS + relation_B]
            contexts = world.contexts(gold_BS[:, None], entity_B, relation_B)
            labels_BT = labels_of(gold_BS if step < 100 else gold_BS[:, 2:])
            yield rag_nll(world.generator, *contexts, torch.zeros(64, 1), labels_BT, variant="token").mean()

    steps(world.generator, [{"params": world.generator.parameters(), "lr": 3e-3}], losses())
    return world.generator


def train_end_to_end(world: World, variant: Variant, *, frozen: bool) -> None:
    groups = [{"params": list(world.generator.parameters()), "lr": 3e-3}]
    if not frozen:
        groups.append({"params": [world.words_RD], "lr": 1e-2})

    def losses() -> Iterator[Tensor]:
        for _ in range(50):
            entity_B, relation_B = world.questions(32, TRAINED)
            passages_N4 = world.passages()
            rows_BK, scores_BK = world.retrieved(entity_B, relation_B)
            contexts = world.contexts(passages_N4[rows_BK], entity_B, relation_B)
            labels_BT = labels_of(passages_N4[entity_B * RELATIONS + relation_B, 2:])
            yield rag_nll(world.generator, *contexts, scores_BK, labels_BT, variant=variant).mean()

    steps(world, groups, losses())


@torch.no_grad()
def exact_match_and_recall(world: World, variant: Variant) -> tuple[float, float]:
    """On all questions about entities that the training end to end did not name: EM of the best answer, and recall@1."""
    held_out = torch.cartesian_prod(torch.arange(TRAINED, ENTITIES), torch.arange(RELATIONS))
    entity_B, relation_B = held_out.unbind(1)
    passages_N4, gold_B = world.passages(), entity_B * RELATIONS + relation_B
    rows_BK, scores_BK = world.retrieved(entity_B, relation_B)
    contexts = world.contexts(passages_N4[rows_BK], entity_B, relation_B)
    decoded = DECODE[variant](world.generator, *contexts, scores_BK, num_beams=3, max_new_tokens=4)
    expected = passages_N4[gold_B, 2:].tolist()
    em = sum(best.token_ids == answer for (best,), answer in zip(decoded, expected, strict=True)) / len(expected)
    return em, float((rows_BK[:, 0] == gold_B).float().mean())


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_answers_alone_teach_which_passage_to_find_and_a_frozen_question_encoder_stays_behind(
    reader: Any, variant: Variant
) -> None:
    scores = {}
    for frozen in (False, True):
        world = World(copy.deepcopy(reader))
        before = exact_match_and_recall(world, variant)
        train_end_to_end(world, variant, frozen=frozen)
        scores[frozen] = before, exact_match_and_recall(world, variant)
    (em_before, recall_before), (em, recall) = scores[False]
    assert max(em_before, recall_before) < 0.5
    assert em >= 0.9
    assert recall >= 0.9
    _, (frozen_em, frozen_recall) = scores[True]
    assert frozen_recall == recall_before
    assert frozen_em < 0.5
