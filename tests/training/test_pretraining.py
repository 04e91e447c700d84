"""A generator made from an encoder: its first weights, its training examples, and learning to copy."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from rag_core.corpus.passages import Passage
from rag_core.errors import ConfigError, InputError
from rag_core.model.reader import GeneratorReader, load_generator
from rag_core.questions.questions import Question
from rag_core.reading.contexts import ContextCount
from rag_core.training.loop import Hooks, Place, run_training
from rag_core.training.objectives import ReadingExample
from rag_core.training.pretraining import (
    PretrainConfig,
    build_generator,
    copy_then_read,
    copying_examples,
    read_pairs,
    reading_examples,
    reading_objective,
)
from tests.support.small_corpus import FACTS, PROMPT, QUESTIONS, make_encoder, optimizer

PASSAGES = [Passage(*fact) for fact in FACTS]
QUESTION_ROWS = [
    Question(str(row), text, (answer,), kind, (gold,)) for row, (text, answer, gold, kind) in enumerate(QUESTIONS)
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("pretraining") / "encoder")


def _config(encoder: Path, **changes: object) -> PretrainConfig:
    small = {"encoder": str(encoder), "encoder_layers": 2, "decoder_layers": 1, "prompt": PROMPT}
    return PretrainConfig.model_validate(small | changes)


def test_both_sides_start_from_the_encoders_first_layers(encoder: Path) -> None:
    model, _ = build_generator(_config(encoder))
    source = BertModel.from_pretrained(encoder).state_dict()
    assert (model.config.encoder.num_hidden_layers, model.config.decoder.num_hidden_layers) == (2, 1)
    for side, layers in ((model.encoder, 2), (model.decoder.bert, 1)):
        own = {name: tensor for name, tensor in side.state_dict().items() if "crossattention" not in name}
        assert max(int(name.split(".")[2]) for name in own if name.startswith("encoder.layer.")) == layers - 1
        assert all(torch.equal(tensor, source[name]) for name, tensor in own.items())


def test_cross_attention_starts_with_the_weights_of_self_attention(encoder: Path) -> None:
    model, _ = build_generator(_config(encoder, decoder_layers=2))
    source = BertModel.from_pretrained(encoder)
    for layer, known in zip(model.decoder.bert.encoder.layer, source.encoder.layer, strict=True):
        cross = dict(layer.crossattention.named_parameters())
        expected = dict(known.attention.named_parameters())
        assert cross.keys() == expected.keys()
        assert all(torch.equal(cross[name], expected[name]) for name in cross)
        # A copy, not the same tensor, as the two are trained separately.
        assert all(cross[name] is not tensor for name, tensor in layer.attention.named_parameters())


def test_fresh_parameters_learn_at_four_times_the_rate_and_every_parameter_once(encoder: Path) -> None:
    config = _config(encoder, learning_rate=1e-3)
    model, tokenizer = build_generator(config)
    known, fresh = reading_objective(GeneratorReader(model, tokenizer, PROMPT), config).parameter_groups()
    assert (known["lr"], fresh["lr"]) == (1e-3, 4e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(map(id, [*known["params"], *fresh["params"]])) == sorted(names)
    taken = {names[id(parameter)] for parameter in fresh["params"]}
    # Fresh parameters: the head and the attention to the passages.
    from_encoder = set(BertModel.from_pretrained(encoder).state_dict())
    new = {
        name
        for name in names.values()
        if name.removeprefix("decoder.bert.").removeprefix("encoder.") not in from_encoder
    }
    new = {name for name in new if name.removeprefix("decoder.bert.") not in from_encoder}
    assert taken == new
    assert any("crossattention" in name for name in taken)


def test_special_tokens_are_set_and_survive_saving(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = build_generator(_config(encoder))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load_generator(tmp_path)
    cls, sep, pad = (tokenizer_again.convert_tokens_to_ids(token) for token in ("[CLS]", "[SEP]", "[PAD]"))
    assert (cls, sep, pad) == (2, 3, 0)
    for each_model in (model, again):
        for settings in (each_model.config, each_model.generation_config):
            assert (settings.decoder_start_token_id, settings.eos_token_id, settings.pad_token_id) == (cls, sep, pad)
    # The pooler is never used, so it does not matter whether it is kept.
    weights = {name: tensor for name, tensor in model.state_dict().items() if "pooler" not in name}
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in weights.items())


def test_dropout_is_set_on_both_sides(encoder: Path) -> None:
    model, _ = build_generator(_config(encoder, dropout=0.25))
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


def test_more_layers_than_the_encoder_has_are_refused(encoder: Path) -> None:
    for changes in ({"encoder_layers": 3}, {"decoder_layers": 3}):
        with pytest.raises(ConfigError, match="has 2 layers, but the settings keep 3"):
            build_generator(_config(encoder, **changes))


def test_an_encoder_that_is_no_bert_is_refused(encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(encoder, tmp_path / "roberta")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    RobertaModel(RobertaConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ConfigError, match=r"is of type 'roberta'"):
        build_generator(_config(tmp_path / "roberta"))


def test_an_encoder_is_refused_as_generator(encoder: Path) -> None:
    assert BertConfig.from_pretrained(encoder).is_encoder_decoder is False
    with pytest.raises(ConfigError, match=r"is an encoder \(bert\)"):
        load_generator(encoder)


def test_the_target_of_copying_is_the_passage() -> None:
    assert copying_examples(PASSAGES[:2]) == [ReadingExample("", passage, passage.text) for passage in PASSAGES[:2]]


def test_reading_pairs_each_question_with_its_gold_passage() -> None:
    stranger = Question("x", "who?", ("me",), None, ("elsewhere",))
    mute = Question("y", "who?", (), None, ("lyon:river",))
    examples = reading_examples([*QUESTION_ROWS[:3], stranger, mute], PASSAGES)
    assert [(example.question, example.passage.id, example.target) for example in examples] == [
        (text, gold, answer) for text, answer, gold, _ in QUESTIONS[:3]
    ]


def test_questions_whose_gold_passages_are_not_in_the_corpus_are_refused() -> None:
    for questions in ([Question("x", "who?", ("me",), None, ("elsewhere",))], [Question("x", "who?", ("me",))], []):
        with pytest.raises(InputError, match="gold_passage_ids"):
            reading_examples(questions, PASSAGES)


def test_passages_are_copied_up_to_copy_steps_and_questions_read_afterwards(encoder: Path) -> None:
    config = _config(encoder, copy_steps=3)
    copying, batch = copying_examples(PASSAGES), reading_examples(QUESTION_ROWS, PASSAGES)[:5]
    seen = [copy_then_read(copying, step, batch, config) for step in (1, 2, 3, 4, 5)]
    assert all(len(batch) == 5 for batch in seen)
    assert all(example in copying for batch in seen[:3] for example in batch)
    assert seen[3] == seen[4] == batch
    # Each step copies other passages, the same ones in every run and on every rank.
    assert seen[0] != seen[1] != seen[2]
    assert copy_then_read(copying, 2, batch, config) == seen[1]


def test_a_generator_learns_to_copy_within_a_hundred_steps(encoder: Path) -> None:
    config = _config(encoder, learning_rate=2e-3)
    prompt = PROMPT.model_copy(update={"max_answer_tokens": 12})
    torch.manual_seed(3)
    model, tokenizer = build_generator(config)
    objective = reading_objective(GeneratorReader(model, tokenizer, prompt), config)
    copying = copying_examples(PASSAGES)

    def nll() -> float:
        with torch.no_grad():
            return float(objective.eval()(copying).mean())

    before = nll()
    run_training(objective, copying, optimizer(100, batch_size=9, warmup_steps=5), Place(), Hooks())
    assert nll() < 0.2 * before


def test_the_nll_of_reading_equals_the_generators_own_loss(encoder: Path) -> None:
    config = _config(encoder)
    model, tokenizer = build_generator(config)
    example = reading_examples(QUESTION_ROWS, PASSAGES)[1]
    nll_B = reading_objective(GeneratorReader(model.eval(), tokenizer, PROMPT), config)([example]).detach()
    text = f"{example.passage.text} // {example.question}"
    labels = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    with torch.no_grad():
        starts = torch.tensor([[tokenizer.cls_token_id, *labels[:-1]]])
        logits_TV = model(**tokenizer(text, return_tensors="pt"), decoder_input_ids=starts).logits[0]
    expected = torch.nn.functional.cross_entropy(logits_TV.double(), torch.tensor(labels), reduction="sum")
    assert nll_B.shape == (1,)
    assert float(nll_B) == pytest.approx(float(expected), rel=1e-5)


def test_dev_scores_have_the_share_of_contexts_cut_and_leave_the_count_of_training(encoder: Path) -> None:
    from tasks.stages.pretrain_generator import reading_scores

    config = _config(encoder, prompt=PROMPT.model_copy(update={"max_context_tokens": 18, "max_answer_tokens": 3}))
    model, tokenizer = build_generator(config)
    reader = GeneratorReader(model.eval(), tokenizer, config.prompt)
    by_id = {passage.id: passage for passage in PASSAGES}
    # A batch of 64 examples, and one of 16 equal examples.
    pairs = [(question, by_id[question.gold_passage_ids[0]]) for question in QUESTION_ROWS] * 8
    pairs += pairs[:1] * 16
    cut = [len(tokenizer(f"{passage.text} // {question.question}")["input_ids"]) > 18 for question, passage in pairs]
    assert 0 < sum(cut) < len(cut) == 80
    scores = reading_scores(reader, pairs, config)
    assert set(scores) == {"dev_em", "dev_f1", "dev_contexts_cut_share"}
    assert scores["dev_contexts_cut_share"] == pytest.approx(sum(cut) / 80)
    assert reader.count == ContextCount(0, 0)


def test_a_question_is_read_over_the_first_of_its_gold_passages_that_the_corpus_has() -> None:
    known = PASSAGES[0]
    question = Question("x", "who?", ("me",), None, ("elsewhere", known.id, PASSAGES[1].id))
    unknown = Question("y", "who?", ("me",), None, ("elsewhere",))
    (example,) = reading_examples([question, unknown], PASSAGES)
    assert example.passage == known
    assert read_pairs([question, unknown], PASSAGES) == [(question, known)]
