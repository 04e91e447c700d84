"""Training end to end: the loss and its gradient by hand, the order of examples, and what ends a run."""

from __future__ import annotations

from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rag_core.embeddings.text_encoder import fingerprint_of_weights
from rag_core.errors import ConfigError
from rag_core.index.passage_index import PassageIndex
from rag_core.model.rag_model import RagModel
from rag_core.questions.questions import Question
from rag_core.reading.contexts import ContextCount
from rag_core.reading.likelihood import Variant
from rag_core.storage.artifact import fingerprint_of_files, open_artifact
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import Hooks, OptimizerConfig, Place, global_batches, run_training
from rag_core.training.objectives import EndToEnd, EndToEndRates, Reading, ReadingExample
from tests.support.small_corpus import (
    PROMPT,
    QUESTIONS,
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

EXAMPLES = [Question(str(n), text, (answer,), kind, (gold,)) for n, (text, answer, gold, kind) in enumerate(QUESTIONS)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, PassageIndex]:
    folder = tmp_path_factory.mktemp("training")
    encoder = make_encoder(folder / "encoder")
    return encoder, make_generator(folder / "generator", encoder), make_index(folder / "index", encoder)


def _objective(parts: tuple[Path, Path, PassageIndex], variant: Variant = "sequence", **rates: float) -> EndToEnd:
    model = RagModel.from_parts(model_config(parts[0], parts[1]))
    return EndToEnd(model, parts[2], variant, EndToEndRates(**{"question_encoder": 1e-3, "generator": 1e-3} | rates))


def _nll_by_hand(objective: EndToEnd, index: PassageIndex, example: Question, variant: Variant) -> torch.Tensor:
    """Score every passage of the corpus by its stored vector, and read the best three one at a time, in float64."""
    model = objective.model
    tokenizer = model.generator_tokenizer
    ids = torch.tensor([model.question_encoder.tokenizer(example.question)["input_ids"]])
    query_D = model.question_encoder.model(ids).last_hidden_state[0].mean(dim=0)
    scores_N = 4.0 * (torch.from_numpy(np.load(index.path / "vectors.npy")) @ query_D)
    best_K = scores_N.topk(3).indices
    prior_K = scores_N[best_K].double().softmax(dim=0)
    labels = tokenizer(example.answers[0], add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    starts = torch.tensor([[tokenizer.cls_token_id, *labels[:-1]]])
    token_probs = []
    for row in best_K.tolist():
        context = tokenizer(
            f"{index.passages_of(np.array([[int(row)]]))[0][0].text} // {example.question}", return_tensors="pt"
        )
        inputs = {name: context[name] for name in ("input_ids", "attention_mask")}
        logits_TV = model.generator(**inputs, decoder_input_ids=starts).logits[0].double()
        token_probs.append(logits_TV.softmax(dim=-1)[range(len(labels)), labels])
    probs_KT = torch.stack(token_probs)
    if variant == "sequence":
        return -(prior_K @ probs_KT.prod(dim=1)).log()
    return -(prior_K @ probs_KT).log().sum()


@pytest.mark.parametrize("variant", ["sequence", "token"])
def test_the_loss_and_both_gradients_equal_an_evaluation_by_hand(
    parts: tuple[Path, Path, PassageIndex], variant: Variant
) -> None:
    objective = _objective(parts, variant).eval()
    # Move away from the untrained start, where all passages are equally likely and the encoder gets no gradient.
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in objective.model.generator.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    nll_B = objective(EXAMPLES[:4])
    by_hand_B = torch.stack([_nll_by_hand(objective, parts[2], example, variant) for example in EXAMPLES[:4]])
    torch.testing.assert_close(nll_B.double(), by_hand_B, rtol=1e-4, atol=1e-4)
    for group in objective.parameter_groups():
        actual, expected = (
            torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), group["params"], retain_graph=True)])
            for loss in (nll_B, by_hand_B)
        )
        assert expected.norm() > 0.1
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_reader_teaches_the_question_encoder_which_passage_to_find(parts: tuple[Path, Path, PassageIndex]) -> None:
    model, index = RagModel.from_parts(model_config(parts[0], parts[1], num_docs=9)), parts[2]
    facts = {example.gold_passage_ids[0]: example.answers[0] for example in EXAMPLES} | {"cork:river": "Lee"}
    # The reader learns to answer with its passage's fact, whatever the question; so only the right passage can help.
    examples = [
        ReadingExample(e.question, p, facts[p.id]) for e in EXAMPLES for p in index.passages_of(np.arange(9)[None])[0]
    ]
    reading = Reading(model.reader, rate=2e-3, fresh=("crossattention",), fresh_factor=4)
    run_training(reading, examples, optimizer(120, batch_size=24, warmup_steps=5), Place(), Hooks())
    objective = EndToEnd(model, index, "sequence", EndToEndRates(question_encoder=1e-3, generator=0))
    before = _gold_priors(model, index)
    run_training(objective, EXAMPLES, optimizer(40, batch_size=8, warmup_steps=5), Place(), Hooks())
    after = _gold_priors(model, index)
    assert before.mean() < 0.4
    assert after.mean() > 0.8
    assert (after > before).all()


def _gold_priors(model: RagModel, index: PassageIndex) -> torch.Tensor:
    rows = {passage.id: row for row, passage in enumerate(index.passages_of(np.arange(len(index))[None])[0])}
    gold_B1 = torch.tensor([[rows[example.gold_passage_ids[0]]] for example in EXAMPLES])
    queries_BD = torch.from_numpy(model.question_encoder.encode([example.question for example in EXAMPLES]))
    scores_BN = 4.0 * queries_BD @ torch.from_numpy(np.load(index.path / "vectors.npy")).T
    return scores_BN.softmax(dim=1).gather(1, gold_B1)[:, 0]


def test_training_without_labels_lowers_the_loss_moves_both_parts_and_leaves_the_index(
    parts: tuple[Path, Path, PassageIndex],
) -> None:
    objective = _objective(parts, question_encoder=2e-3, generator=4e-3)
    model, index = objective.model, parts[2]

    def state() -> tuple[float, str, str]:
        with torch.no_grad():
            nll = float(objective.eval()(EXAMPLES).mean())
        prints = (fingerprint_of_weights(part) for part in (model.question_encoder, model.generator))
        return nll, *prints

    files = sorted(path for path in index.path.iterdir() if path.is_file())
    before, files_before = state(), fingerprint_of_files(files)
    run_training(objective, EXAMPLES, optimizer(60, batch_size=8, warmup_steps=5), Place(), Hooks())
    after = state()
    assert after[0] < 0.4 * before[0]
    assert after[1] != before[1]
    assert after[2] != before[2]
    assert fingerprint_of_files(files) == files_before


def test_a_rate_of_zero_freezes_that_part_alone(parts: tuple[Path, Path, PassageIndex]) -> None:
    for frozen, moving in (("question_encoder", "generator"), ("generator", "question_encoder")):
        objective = _objective(parts, **{frozen: 0.0})
        before = {part: fingerprint_of_weights(getattr(objective.model, part)) for part in (frozen, moving)}
        run_training(objective, EXAMPLES, optimizer(2), Place(), Hooks())
        assert fingerprint_of_weights(getattr(objective.model, frozen)) == before[frozen]
        assert fingerprint_of_weights(getattr(objective.model, moving)) != before[moving]
        assert [group["lr"] for group in objective.parameter_groups()] == [1e-3]


def test_nothing_to_train_is_refused(parts: tuple[Path, Path, PassageIndex]) -> None:
    with pytest.raises(ConfigError, match="every learning rate is 0"):
        run_training(_objective(parts, question_encoder=0, generator=0), EXAMPLES, optimizer(1), Place(), Hooks())
    with pytest.raises(ConfigError, match="training set is empty"):
        run_training(_objective(parts), [], optimizer(1), Place(), Hooks())


class _Line(nn.Module):
    """nll of a pair (x, y) is (w·x − y)²: small enough for a calculation by hand."""

    def __init__(self, rate: float = 0.1, **settings: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25]))
        self.rate, self.seen = rate, []

    def forward(self, examples: list[tuple[float, float]]) -> torch.Tensor:
        self.seen += examples
        x_B, y_B = torch.tensor(examples).T
        return (self.weight[0] * x_B + self.weight[1] - y_B).square()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": [self.weight], "lr": self.rate}]


PAIRS = [(float(np.sin(number)), float(np.cos(3 * number))) for number in range(11)]


def test_accumulated_parts_give_the_update_of_one_whole_batch() -> None:
    weights, parts_seen = [], []
    for accumulation in (1, 2, 4):
        line = _Line()
        run_training(line, PAIRS, optimizer(5, batch_size=8, accumulation=accumulation), Place(), Hooks())
        weights.append(line.weight.detach().clone())
        parts_seen.append(line.seen)
    torch.testing.assert_close(weights[1], weights[0])
    torch.testing.assert_close(weights[2], weights[0])
    assert parts_seen[0] == parts_seen[1] == parts_seen[2]
    assert not torch.equal(weights[0], _Line().weight)


def test_real_accumulation_equals_one_batch_end_to_end(parts: tuple[Path, Path, PassageIndex]) -> None:
    norms: list[list[float]] = []
    for accumulation in (1, 4):
        logs: list[float] = []
        hooks = Hooks(log=lambda step, metrics, logs=logs: logs.extend((metrics["train_nll"], metrics["grad_norm"])))
        config = optimizer(2, accumulation=accumulation, precision="float32")
        run_training(_objective(parts), EXAMPLES, config, Place(), hooks)
        norms.append(logs)
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-3)


def test_an_epoch_holds_every_example_once_and_a_batch_is_always_full() -> None:
    batches = list(islice(global_batches(list(range(10)), optimizer(1, batch_size=4)), 10))
    assert [len(batch) for batch in batches] == [4] * 10
    flat = list(chain(*batches))
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_order_follows_from_the_seed_alone() -> None:
    def order(**changes: int) -> list[list[int]]:
        return list(islice(global_batches(list(range(30)), optimizer(1, **changes)), 20))

    first = order(seed=3)
    np.random.seed(99)
    assert order(seed=3) == first
    assert order(seed=4) != first
    assert list(chain(*order(seed=3, batch_size=8)))[:80] == list(chain(*first))


def test_ranks_share_out_the_batches_that_one_worker_would_see() -> None:
    lines = {}
    for world_size in (1, 2):
        for rank in range(world_size):
            line = lines[world_size, rank] = _Line()
            run_training(line, PAIRS, optimizer(6, batch_size=4), Place(rank=rank, world_size=world_size), Hooks())
    for step in range(6):
        whole = lines[1, 0].seen[4 * step : 4 * step + 4]
        shares = [lines[2, rank].seen[2 * step : 2 * step + 2] for rank in (0, 1)]
        assert sorted(shares[0] + shares[1]) == sorted(whole)
    assert len(lines[2, 0].seen) == len(lines[2, 1].seen) == 12


@pytest.mark.parametrize(("batch_size", "workers", "accumulation"), [(5, 2, 1), (6, 2, 2), (4, 8, 1), (2, 1, 4)])
def test_a_batch_that_cannot_be_dealt_out_is_refused_with_its_numbers(
    batch_size: int, workers: int, accumulation: int
) -> None:
    config = optimizer(1, batch_size=batch_size, accumulation=accumulation)
    message = f"batch_size {batch_size} cannot be divided into {workers} workers × {accumulation} accumulated parts"
    with pytest.raises(ConfigError, match=message):
        run_training(_Line(), PAIRS, config, Place(world_size=workers), Hooks())


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(parts: tuple[Path, Path, PassageIndex]) -> None:
    batch = Hooks(batch=lambda step, examples: [(float("nan"), 0.0)] * len(examples) if step == 3 else examples)
    line = _Line()
    with pytest.raises(ConfigError, match=r"diverged at step 3: loss nan"):
        run_training(line, PAIRS, optimizer(5), Place(), batch)
    assert torch.isfinite(line.weight).all()
    # Adam's first step is as large as the rate; float32 overflows in the second pass.
    with pytest.raises(ConfigError, match=r"diverged at step 2: loss (inf|nan)"):
        run_training(_Line(rate=1e30), PAIRS, optimizer(5), Place(), Hooks())
    with pytest.raises(ConfigError, match=r"diverged at step \d+: .*Lower the learning rates"):
        run_training(_objective(parts, generator=1e30), EXAMPLES, optimizer(8), Place(), Hooks())


@pytest.mark.parametrize("warmup", [0, 4])
def test_the_rate_rises_over_the_warm_up_and_falls_to_zero(monkeypatch: pytest.MonkeyPatch, warmup: int) -> None:
    used: list[float] = []
    plain_step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *arguments: (used.append(self.param_groups[0]["lr"]), plain_step(self, *arguments))[1],
    )
    run_training(_Line(rate=0.1), PAIRS, optimizer(10, warmup_steps=warmup), Place(), Hooks())
    rise = [0.1 * (step + 1) / 4 for step in range(warmup)]
    fall = [0.1 * (10 - step) / (10 - warmup) for step in range(warmup, 10)]
    assert used == pytest.approx(rise + fall)
    assert max(used) == pytest.approx(0.1)


def test_gradients_are_clipped_and_their_norm_before_clipping_is_reported() -> None:
    logs: list[dict[str, float]] = []
    line = _Line(rate=0.0)
    hooks = Hooks(log=lambda step, metrics: logs.append(metrics))
    run_training(line, PAIRS, optimizer(1, batch_size=11, max_grad_norm=1e-3, weight_decay=0), Place(), hooks)
    x_B, y_B = np.array(PAIRS).T
    error_B = 0.5 * x_B - 0.25 - y_B
    assert logs[0]["train_nll"] == pytest.approx(np.mean(error_B**2), rel=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(np.hypot(np.mean(2 * error_B * x_B), np.mean(2 * error_B)), rel=1e-5)


def test_reports_and_evaluations_come_at_their_steps_and_at_the_end() -> None:
    logged, kept = [], []
    hooks = Hooks(
        log=lambda step, _: logged.append(step),
        evaluate=lambda step: {"step": float(step)},
        keep=lambda step, metrics: kept.append((step, metrics["step"])),
    )
    config = OptimizerConfig(steps=7, batch_size=2, log_every=2, eval_every=3)
    run_training(_Line(), PAIRS, config, Place(), hooks)
    assert logged == [2, 4, 6, 7]
    assert kept == [(3, 3.0), (6, 6.0), (7, 7.0)]


# Some contexts of three passages are longer than this, some are not.
SHORT = PROMPT.model_copy(update={"max_context_tokens": 18, "max_answer_tokens": 4})


def _cut_by_hand(parts: tuple[Path, Path, PassageIndex]) -> dict[str, int]:
    """For each question, how many of its three contexts are too long, with the untrained question encoder."""
    model, index = RagModel.from_parts(model_config(parts[0], parts[1])), parts[2]
    cut = {}
    for example in EXAMPLES:
        matches = index.search(model.question_encoder.encode([example.question]), 3)
        texts = [f"{passage.text} // {example.question}" for passage in index.passages_of(matches.rows_BK)[0]]
        cut[example.id] = sum(len(model.generator_tokenizer(text)["input_ids"]) > 18 for text in texts)
    assert 0 < sum(cut.values()) < 3 * len(EXAMPLES)
    return cut


class _Listener:
    """Takes the place of the MLflow run and of the driver."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.points.append((step, metrics["contexts_cut_share"]))

    def start_at(self, _: int) -> dict[str, int]:
        return {}

    def advance(self, *_: object) -> None: ...
    def mark_logged(self, *_: object) -> None: ...


def test_each_point_of_the_curves_has_the_share_of_contexts_cut_since_the_last_point_without_dev(
    parts: tuple[Path, Path, PassageIndex], tmp_path: Path
) -> None:
    from tasks.stages.train import TrainConfig, dev_scores
    from tasks.tracking.reporter import Reporter

    cut = _cut_by_hand(parts)
    model = RagModel.from_parts(model_config(parts[0], parts[1]).model_copy(update={"prompt": SHORT}))
    objective = EndToEnd(model, parts[2], "token", EndToEndRates(question_encoder=0, generator=1e-3))
    config = optimizer(5, batch_size=2, log_every=2, eval_every=1, accumulation=2)
    listener = _Listener()
    reporter = Reporter(listener, listener, lambda _: None, lambda _: 0.0, 0, model.reader.count, Checkpoints(tmp_path))
    shares: list[float] = []

    def evaluate(_: int) -> dict[str, float]:
        train_config = TrainConfig(optimizer=config)
        scores = dev_scores(model, objective, parts[2], EXAMPLES[:3], "token", train_config)
        shares.append(scores["dev_contexts_cut_share"])
        return scores

    run_training(objective, EXAMPLES, config, Place(), Hooks(log=reporter.log, evaluate=evaluate))
    steps = [sum(cut[example.id] for example in batch) for batch in islice(global_batches(EXAMPLES, config), 5)]
    expected = [(2, sum(steps[:2]) / 12), (4, sum(steps[2:4]) / 12), (5, steps[4] / 6)]
    assert len({share for _, share in expected}) > 1
    assert listener.points == [(step, pytest.approx(share)) for step, share in expected]
    assert reporter.result(5)["contexts"] == ContextCount(5 * 2 * 3, sum(steps))
    assert shares == pytest.approx([sum(cut[example.id] for example in EXAMPLES[:3]) / 9] * 5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_add_up_the_contexts_they_cut_and_the_curves_go_on_after_the_best_step(
    services: Path, parts: tuple[Path, Path, PassageIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    import tasks.stages.train
    from flows.stages.train import train_token

    curves: list[tuple[list[dict[str, float]], list[dict[str, float]]]] = []
    draw = tasks.stages.train.training_curves
    monkeypatch.setattr(tasks.stages.train, "training_curves", lambda *args: (curves.append(args), draw(*args))[1])
    cut = _cut_by_hand(parts)
    questions = write_questions_jsonl(tmp_path / "questions.jsonl")
    model = model_config(parts[0], parts[1]).model_copy(update={"prompt": SHORT})
    settings = optimizer(6, log_every=2, eval_every=2)
    # At this rate the likelihood of dev answers falls from the start: the first evaluation is the best.
    rates = EndToEndRates(question_encoder=0, generator=3.0)
    config = tasks.stages.train.TrainConfig(optimizer=settings, rates=rates, best_by="nll", num_workers=2)
    result = train_token(parts[2].path, questions, questions, tmp_path / "out", model, config)
    steps = [sum(cut[example.id] for example in batch) for batch in islice(global_batches(EXAMPLES, settings), 6)]
    counts = open_artifact(tmp_path / "out", "rag-model").counts
    assert result.counts == counts
    assert (counts["contexts"], counts["contexts_cut"]) == (6 * 4 * 3, sum(steps))
    history, dev = curves[0]
    assert [point["step"] for point in history] == [point["step"] for point in dev] == [2, 4, 6]
    points = MlflowClient().get_metric_history(result.run_id, "contexts_cut_share")
    by_hand = [sum(steps[start : start + 2]) / 24 for start in (0, 2, 4)]
    assert [(point.step, point.value) for point in points] == [
        (step, pytest.approx(share)) for step, share in zip((2, 4, 6), by_hand, strict=True)
    ]
    assert counts["best_step"] < 6, "the last step was the best, so no curve goes on after it"
