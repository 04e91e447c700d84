"""Dev scores during training: over which questions they are means, and which dev files and settings are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rag_core.errors import ConfigError, InputError, NotFiniteError
from rag_core.evaluation.scores import means_of
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.questions.questions import Question, QuestionFile
from rag_core.training.loop import Hooks, Place, run_training
from rag_core.training.objectives import EndToEnd, EndToEndRates
from tasks.stages.train import TrainConfig, dev_scores, scored_of_dev
from tests.support.small_corpus import QUESTIONS, make_encoder, make_generator, make_index, model_config, optimizer

EXAMPLES = [Question(str(n), text, (answer,), kind, (gold,)) for n, (text, answer, gold, kind) in enumerate(QUESTIONS)]
IMPOSSIBLE = Question("x", "who rules Lyon?", (), None, ("lyon:country",), is_impossible=True)
# This pattern matches every answer, because an untrained generator gives no right ones.
PATTERN = Question("r", "which country is Cork in?", (r".*",), answers_are="regex")
FILE = Path("questions.jsonl")
CONFIG = TrainConfig(optimizer=optimizer(4, precision="float32"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PassageIndex]:
    folder = tmp_path_factory.mktemp("dev-scores")
    encoder = make_encoder(folder / "encoder")
    return encoder, make_generator(folder / "generator", encoder), make_index(folder / "index", encoder)


@pytest.fixture(scope="module")
def model(parts: tuple[Path, Path, PassageIndex]) -> RagModel:
    return RagModel.from_parts(model_config(parts[0], parts[1])).eval()


def _objective(model: RagModel, index: PassageIndex, rate: float = 1e-3) -> EndToEnd:
    return EndToEnd(model, index, "token", EndToEndRates(question_encoder=rate, generator=rate))


def test_unanswerable_questions_change_neither_the_likelihood_nor_any_other_dev_score(
    parts: tuple[Path, Path, PassageIndex], model: RagModel
) -> None:
    objective, index = _objective(model, parts[2]).eval(), parts[2]
    expected = dev_scores(model, objective, index, EXAMPLES[:4], "token", CONFIG)
    assert expected["dev_nll"] > 0
    mixed = [IMPOSSIBLE, *EXAMPLES[:2], replace(IMPOSSIBLE, id="y"), *EXAMPLES[2:4]]
    chosen = scored_of_dev(_file(mixed), CONFIG)
    assert chosen == EXAMPLES[:4]
    assert dev_scores(model, objective, index, chosen, "token", CONFIG) == pytest.approx(expected)


def test_a_dev_score_is_a_mean_over_the_questions_that_have_it(
    parts: tuple[Path, Path, PassageIndex], model: RagModel
) -> None:
    """A regular expression has no likelihood and no F1, and must not be counted in theirs as 0."""
    objective, index = _objective(model, parts[2]).eval(), parts[2]
    alone = dev_scores(model, objective, index, EXAMPLES[:3], "token", CONFIG)
    with_pattern = dev_scores(model, objective, index, [*EXAMPLES[:3], PATTERN], "token", CONFIG)
    assert [with_pattern[name] for name in ("dev_nll", "dev_f1")] == pytest.approx([alone["dev_nll"], alone["dev_f1"]])
    assert with_pattern["dev_em"] == pytest.approx((alone["dev_em"] * 3 + 1) / 4)
    only = dev_scores(model, objective, index, [PATTERN], "token", CONFIG)
    assert set(only) == {"dev_em", "dev_recall@1", "dev_recall@3", "dev_contexts_cut_share"}


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_dev_scores_of_several_workers_are_those_of_one_though_shards_are_uneven_or_empty(
    parts: tuple[Path, Path, PassageIndex], model: RagModel, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    objective, index = _objective(model, parts[2]).eval(), parts[2]
    questions = [*EXAMPLES[:3], PATTERN, replace(EXAMPLES[4], gold_passage_ids=())]
    expected = dev_scores(model, objective, index, questions, "token", CONFIG)
    sent: list[dict[str, float]] = []

    def record(values: dict[str, float]) -> dict[str, float]:
        sent.append(values)
        return values

    monkeypatch.setattr("tasks.stages.train.sum_over_workers", record)
    for rank in range(workers):
        dev_scores(model, objective, index, questions[rank::workers], "token", CONFIG)
    assert len({tuple(values) for values in sent}) == 1, "all workers must send the same names in the same order"
    sums = {name: sum(values[name] for values in sent) for name in sent[0]}
    scores = {f"dev_{name}": value for name, value in means_of(sums).items()}
    assert scores == pytest.approx({name: value for name, value in expected.items() if "cut" not in name}, rel=1e-5)


def test_dev_questions_by_which_no_weights_can_be_chosen_are_refused() -> None:
    by_nll = CONFIG.model_copy(update={"best_by": "nll"})
    for questions, config, fault in (
        ([IMPOSSIBLE], CONFIG, "none of the 1 questions has an answer, so nothing can be scored"),
        ([PATTERN], by_nll, "none of the 1 questions has an answer that is a text"),
        ([Question("z", "?")], CONFIG, "line 1: question 'z' has no answer"),
    ):
        with pytest.raises(InputError, match=fault):
            scored_of_dev(_file(questions), config)
    assert scored_of_dev(_file([PATTERN]), CONFIG) == [PATTERN]


def _file(questions: list[Question]) -> QuestionFile:
    return QuestionFile(FILE, "ours", questions, [f"{FILE} line {line}" for line in range(1, len(questions) + 1)])


def test_only_another_rule_than_the_published_one_makes_training_run_again() -> None:
    names = {"rates", "optimizer", "eval_questions", "best_by"}
    assert set(CONFIG.decisive()) == names
    assert set(CONFIG.model_copy(update={"match": "characters"}).decisive()) == {*names, "match"}


def _trained(parts: tuple[Path, Path, PassageIndex], rate: float, damaged: str = "", eval_every: int = 4) -> None:
    model = RagModel.from_parts(model_config(parts[0], parts[1]))
    if damaged:
        next(iter(getattr(model, damaged).parameters())).data.fill_(float("nan"))
    objective, config = _objective(model, parts[2], rate), optimizer(4, eval_every=eval_every, precision="float32")

    def evaluate(_: int) -> dict[str, float]:
        return dev_scores(model, objective, parts[2], EXAMPLES, "token", TrainConfig(optimizer=config))

    run_training(objective, EXAMPLES, config, Place(), Hooks(evaluate=evaluate))


@pytest.mark.parametrize(
    ("rate", "eval_every", "message"),
    [
        (1e30, 4, r"at step 2: not finite: the question encoder's vectors\. The learning rate was 7\.5e\+29"),
        (
            1e30,
            1,
            r"at step 1: not finite: the question encoder's vectors after the update\. The learning rate was 1e\+30",
        ),
        (
            1e38,
            1,
            r"at step 1: not finite: the weights \(\d+ of \d+ tensors, first model\.question_encoder\..*after the",
        ),
        (1e3, 4, r"at step 2: loss [\d.]+, gradient norm inf; not finite: the gradient.*The learning rate was 750"),
    ],
)
def test_a_learning_rate_that_diverges_is_called_that_whichever_part_shows_it_first(
    parts: tuple[Path, Path, PassageIndex], rate: float, eval_every: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^Training diverged {message}.*Lower the learning rates") as error:
        _trained(parts, rate, eval_every=eval_every)
    assert "index" not in str(error.value)


@pytest.mark.parametrize(
    ("damaged", "part"),
    [("question_encoder", "the question encoder's vectors"), ("generator", "the generator's logits")],
)
def test_weights_that_are_not_finite_are_named_and_the_index_is_not_blamed(
    parts: tuple[Path, Path, PassageIndex], damaged: str, part: str
) -> None:
    with pytest.raises(ConfigError, match=rf"at step 1: .*not finite: {part}.*starts from may be damaged"):
        _trained(parts, 1e-3, damaged)
    model = RagModel.from_parts(model_config(parts[0], parts[1])).eval()
    next(iter(getattr(model, damaged).parameters())).data.fill_(float("nan"))
    for variant in ("sequence", "token"):
        with pytest.raises(NotFiniteError, match=f"^Not finite: {part}") as error:
            model.answer(["which country is Lyon in?"], parts[2], variant=variant)  # type: ignore[arg-type]
        assert "too few lists" not in str(error.value)


def test_dev_scores_that_are_not_finite_are_never_kept_as_the_best(parts: tuple[Path, Path, PassageIndex]) -> None:
    model = RagModel.from_parts(model_config(parts[0], parts[1]))
    kept: list[dict[str, float]] = []
    hooks = Hooks(evaluate=lambda _: {"dev_em": 0.5, "dev_nll": float("nan")}, keep=lambda _, dev: kept.append(dev))
    with pytest.raises(ConfigError, match=r"diverged at step 4: not finite: the dev score dev_nll \(nan\)"):
        run_training(_objective(model, parts[2]), EXAMPLES, optimizer(4), Place(), hooks)
    assert kept == []
