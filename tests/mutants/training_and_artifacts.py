"""Faults in resumed training, artifacts and shards, and in the checks of them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINING = "rag_core/training/loop.py"
CHECKPOINT = "rag_core/training/checkpoint.py"
LOCAL = "rag_core/storage/local.py"
MANIFEST = "rag_core/storage/manifest.py"
RESUMED = "tests/training/test_resuming.py tests/training/test_checkpoint.py"
DAMAGED = "tests/storage/test_artifact.py tests/verification/test_verification.py"

TRAINING_AND_ARTIFACTS = (
    # Resumed training
    Mutant(
        "moments not restored",
        CHECKPOINT,
        '            _load_moments(optimizer, checkpoint.folder / OPTIMIZER, state["parameter_groups"])\n',
        "",
        RESUMED,
    ),
    Mutant("weights not restored", CHECKPOINT, "tensor.copy_(file.get_tensor(name))", "file.get_tensor(name)", RESUMED),
    Mutant("schedule restarted", TRAINING, '        self._schedule.load_state_dict(state["schedule"])\n', "", RESUMED),
    Mutant(
        "dropout drawn from the shared generator",
        "rag_core/training/own_draws.py",
        "        if not recomputes:\n",
        "        if False:\n",
        RESUMED,
    ),
    Mutant(
        "the same dropout in every step",
        TRAINING,
        "[config.seed, DROPOUT, self._place.rank, step]",
        "[config.seed, DROPOUT, self._place.rank]",
        RESUMED,
    ),
    Mutant(
        "data restarted",
        TRAINING,
        "global_batches(examples, config, skip=done)",
        "global_batches(examples, config)",
        RESUMED,
    ),
    Mutant(
        "damaged checkpoints used",
        CHECKPOINT,
        "result.newest = self._open(folder, check_content=True)",
        "result.newest = self._open(folder, check_content=False)",
        RESUMED,
    ),
    Mutant("only one checkpoint kept", CHECKPOINT, "KEPT = 2", "KEPT = 1", RESUMED),
    Mutant(
        "best weights deleted",
        CHECKPOINT,
        'best.name not in {f"best-{step:08d}" for step in referenced}',
        "True",
        RESUMED,
    ),
    # Artifacts
    Mutant(
        "content not compared", MANIFEST, "(found := sha256_of_file(file)) != entry.sha256", "(found := '')", DAMAGED
    ),
    Mutant("sizes not compared", MANIFEST, "if size != entry.bytes:", "if size > entry.bytes:", DAMAGED),
    Mutant(
        "files outside the folder used",
        MANIFEST,
        "if not file.resolve().is_relative_to(folder.resolve()):",
        "if not file.is_relative_to(folder):",
        DAMAGED,
    ),
    Mutant(
        "a repair accepted without checking its content",
        "rag_core/verification/repair.py",
        "if not file.is_file() or sha256_of_file(file) != manifest.files[name].sha256:",
        "if not file.is_file():",
        DAMAGED,
    ),
    Mutant(
        "unfinished parts published",
        LOCAL,
        "            drop_unfinished(draft.folder)\n",
        "",
        "tests/stages/test_resume.py::test_what_a_killed_worker_left_half_written_is_not_published",
    ),
    Mutant(
        "two writers at one place",
        "rag_core/storage/writer_lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "tests/storage/test_writer_lock.py",
    ),
    Mutant(
        "a writer that has just started not named",
        "rag_core/storage/writer_lock.py",
        "if name or time.monotonic() > end:",
        "if True:",
        "tests/storage/test_writer_lock.py",
    ),
    Mutant(
        "finished shards embedded again",
        "tasks/on_ray/embedding.py",
        "if out_file.is_file():",
        "if False:",
        "tests/stages/test_finished_shards.py",
    ),
    Mutant(
        "finished shards answered again",
        "tasks/on_ray/answering.py",
        "if part.is_file():",
        "if False:",
        "tests/stages/test_finished_shards.py",
    ),
    Mutant(
        "both of two publishers win",
        "rag_core/storage/object_store.py",
        'Metadata={"writer": mark}, **condition)',
        'Metadata={"writer": mark})',
        "tests/storage/test_object_store.py",
    ),
    # Shards
    Mutant(
        "rows of a shard taken for rows of the index",
        "rag_core/index/shard.py",
        "np.where(rows_BK < 0, -1, rows_BK + self._first_row)",
        "np.where(rows_BK < 0, -1, rows_BK)",
        "tests/index/test_shards.py",
    ),
    Mutant(
        "equal scores in any order",
        "rag_core/index/retriever.py",
        "np.lexsort((rows_BP, -scores_BP), axis=-1)",
        "np.lexsort((-rows_BP, -scores_BP), axis=-1)",
        "tests/index/test_shards.py tests/index/test_passage_index.py",
    ),
    Mutant(
        "vectors of zeros and NaN accepted",
        "rag_core/embeddings/embeddings.py",
        "bad_N = ~np.isfinite(largest_N) | (largest_N == 0)",
        "bad_N = np.isposinf(largest_N)",
        "tests/corpus/test_hostile_inputs.py",
    ),
)
