"""Training that resumes from a checkpoint equals the undisturbed run, to the last bit."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from rag_core.model.adapters.lora import LoraSettings, add_adapters, is_adapter
from rag_core.model.rag_model import RagModel
from rag_core.questions.questions import Question
from rag_core.training.checkpoint import Checkpoints
from rag_core.training.loop import FRESH_WEIGHTS, Hooks, OptimizerConfig, Place, global_batches, run_training
from rag_core.training.objectives import EndToEnd, EndToEndRates
from rag_core.training.own_draws import own_draws
from tests.support.other_draws import draw_in_another_thread
from tests.support.small_corpus import make_encoder, make_generator, make_index, model_config
from tests.training.resumable_runs import CONFIG, EXAMPLES, STEPS, Line, Outcome, run

MakeObjective = Callable[..., EndToEnd]


@pytest.fixture(scope="module")
def make_objective(tmp_path_factory: pytest.TempPathFactory) -> MakeObjective:
    """Returns a new objective with dropout at each call: every step after the first depends on its masks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    encoder = make_encoder(folder / "encoder")
    generator, index = make_generator(folder / "generator", encoder), make_index(folder / "index", encoder)

    def make(dropout: float = 0.2, lora: LoraSettings | None = None, recomputes: bool = False) -> EndToEnd:
        model = RagModel.from_parts(model_config(encoder, generator))
        if lora:
            with own_draws([CONFIG.seed, FRESH_WEIGHTS], torch.device("cpu")):
                add_adapters(model.generator, lora, str(generator))
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        rates = EndToEndRates(question_encoder=1e-3, generator=2e-3)
        return EndToEnd(model, index, "token", rates, gradient_checkpointing=recomputes)

    return make


@pytest.fixture(scope="module")
def undisturbed(make_objective: MakeObjective, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(make_objective, tmp_path_factory.mktemp("undisturbed") / "training", pytest.MonkeyPatch())


@pytest.mark.parametrize("stopped_at", range(1, STEPS))
def test_a_run_stopped_after_any_step_goes_on_to_the_same_bits(
    make_objective: MakeObjective,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: Outcome,
    stopped_at: int,
) -> None:
    first = run(make_objective, tmp_path / "training", monkeypatch, stop_after=stopped_at)
    assert first.done == stopped_at
    draw_in_another_thread()  # the shared generators of a new process would have another state
    second = run(make_objective, tmp_path / "training", monkeypatch)
    assert second.done == STEPS
    second.assert_equals(undisturbed)


@pytest.mark.parametrize("recomputes", [False, True])
def test_adapters_go_on_to_the_same_bits_and_are_all_that_is_kept_of_the_generator(
    make_objective: MakeObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recomputes: bool
) -> None:
    make = functools.partial(make_objective, lora=LoraSettings(rank=2, dropout=0.2))
    config = CONFIG.model_copy(update={"precision": "float32"})  # in which the CPU kernels differ most
    undisturbed = run(make, tmp_path / "undisturbed", monkeypatch, config)
    make = functools.partial(make, recomputes=recomputes)
    run(make, tmp_path / "training", monkeypatch, config, stop_after=4)
    draw_in_another_thread()
    with safe_open(tmp_path / "training" / "step-00000004" / "model.safetensors", framework="pt") as file:
        kept = {name for name in file.keys() if name.startswith("model.generator.")}  # noqa: SIM118  (a file)
    adapters = {name for name, _ in make().named_parameters() if is_adapter(name)}
    buffers = {name for name, _ in make().named_buffers() if name.startswith("model.generator.")}
    assert adapters
    assert kept == adapters | buffers
    run(make, tmp_path / "training", monkeypatch, config).assert_equals(undisturbed)
    start = make().state_dict()
    generator = {name: weight for name, weight in undisturbed.weights.items() if name.startswith("model.generator.")}
    moved = {name for name, weight in generator.items() if not torch.equal(weight, start[name])}
    assert moved == adapters


def test_a_run_without_checkpoints_is_the_same_run(
    make_objective: MakeObjective, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rare = CONFIG.model_copy(update={"checkpoint_every": None})
    run(make_objective, tmp_path / "training", monkeypatch, rare).assert_equals(undisturbed)
    assert sorted(file.name for file in (tmp_path / "training" / "step-00000007").iterdir()) == [
        "manifest.json",
        "state.json",
    ], "after the last step only the state is stored"


@pytest.mark.chaos(short=False)
def test_with_two_threads_a_run_is_repeated_and_resumed_to_the_same_bits(
    make_objective: MakeObjective, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torch.set_num_threads(2)
    try:
        first = run(make_objective, tmp_path / "one", monkeypatch)
        first.assert_equals(run(make_objective, tmp_path / "two", monkeypatch))
        run(make_objective, tmp_path / "three", monkeypatch, stop_after=4)
        first.assert_equals(run(make_objective, tmp_path / "three", monkeypatch))
    finally:
        torch.set_num_threads(1)


def _objective_among_others(make_objective: MakeObjective) -> EndToEnd:
    """An objective with a random number of draws by other threads before every dropout."""
    objective, chance = make_objective(), random.Random(time.monotonic_ns())
    layers = [module for module in objective.modules() if isinstance(module, nn.Dropout)]
    assert len(layers) > 5
    for layer in layers:
        layer.register_forward_pre_hook(lambda *_: draw_in_another_thread(chance.randrange(1, 4)))
    return objective


def test_draws_of_other_threads_from_shared_generators_change_no_bit(
    make_objective: MakeObjective, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for stop_after in (3, 0):
        outcome = run(
            functools.partial(_objective_among_others, make_objective),
            tmp_path / "training",
            monkeypatch,
            stop_after=stop_after,
        )
    outcome.assert_equals(undisturbed)


def test_weights_and_curves_depend_on_dropout(
    make_objective: MakeObjective, undisturbed: Outcome, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Otherwise equal bits would prove nothing about dropout."""
    dev = undisturbed.caller.curves["dev"]
    assert [point["step"] for point in dev] == [3, 6, 7]
    assert [point["step"] for point in undisturbed.caller.curves["history"]] == [2, 4, 6, 7]
    without = run(functools.partial(make_objective, dropout=0.0), tmp_path / "training", monkeypatch)
    assert without.caller.curves["history"][0]["train_nll"] != undisturbed.caller.curves["history"][0]["train_nll"]
    assert without.caller.curves["dev"] != dev


def test_each_step_and_each_rank_draws_its_own_masks() -> None:
    masks: list[torch.Tensor] = []

    class Dropped(Line):
        def forward(self, examples: list[Question]) -> torch.Tensor:
            masks.append(nn.functional.dropout(torch.ones(40), 0.5))
            return super().forward(examples)

    for place in (Place(0, 2), Place(1, 2)):
        run_training(Dropped(), EXAMPLES, CONFIG.model_copy(update={"batch_size": 4}), place, Hooks())
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 2 * 2 * STEPS


def test_an_older_checkpoint_that_holds_random_states_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(Line, tmp_path / "undisturbed", monkeypatch)
    write = Checkpoints.write

    def write_as_before(*arguments: Any) -> None:
        state = arguments[-1]
        for worker in state["workers"]:
            worker["random"] = {"python": [3, [0] * 625, None], "numpy": {}, "torch": "00"}
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_as_before)
        run(Line, tmp_path / "training", monkeypatch, stop_after=4)
    assert '"random"' in (tmp_path / "training" / "step-00000004" / "state.json").read_text()
    run(Line, tmp_path / "training", monkeypatch).assert_equals(undisturbed)


@pytest.mark.parametrize("skip", range(12))
def test_skipping_batches_does_not_change_the_following_ones(skip: int) -> None:
    config = OptimizerConfig(batch_size=4, seed=3)
    examples = list(range(10))
    whole = list(islice(global_batches(examples, config), 20))
    assert list(islice(global_batches(examples, config, skip=skip), 20 - skip)) == whole[skip:]
