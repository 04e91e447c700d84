"""Faults in resumed training, artifacts and shards, and in the checks of them."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

TRAINING = "rag_core/training/loop.py"
CHECKPOINT = "rag_core/training/checkpoint.py"
LOCAL = "rag_core/storage/local.py"
MANIFEST = "rag_core/storage/manifest.py"
RESUMED = "tests/training/test_resuming.py tests/training/test_checkpoint.py"
ADAPTER_FILES = "rag_core/model/adapters/adapter_files.py"
ADAPTERS = "tests/model/test_adapter_files.py"
RECOMPUTED = "tests/training/test_recomputation.py"
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
    # Adapters and gradient checkpointing
    Mutant(
        "adapters not applied in decoding",
        ADAPTER_FILES,
        "inject(generator, config, _read_weights(folder),",
        'inject(generator, config, {n: w * (".lora_B." not in n) for n, w in _read_weights(folder).items()},',
        ADAPTERS,
    ),
    Mutant(
        "adapters of another base accepted",
        ADAPTER_FILES,
        "if fingerprint not in (None, actual):",
        "if False:",
        ADAPTERS,
    ),
    Mutant(
        "special LoRA taken for plain",
        ADAPTER_FILES,
        "    if special:\n",
        "    if False:\n",
        ADAPTERS,
    ),
    Mutant(
        "adapters counted alpha times, not alpha / rank",
        "rag_core/model/adapters/lora.py",
        "lora_alpha=int(settings.alpha)",
        "lora_alpha=settings.rank * int(settings.alpha)",
        "tests/model/test_lora.py",
    ),
    Mutant(
        "adapters left out of merged weights",
        "rag_core/model/adapters/merging.py",
        'if is_adapted and part == "weight":',
        "if False:",
        "tests/model/test_lora.py",
    ),
    Mutant(
        "the base trained with the adapters",
        "rag_core/model/adapters/lora.py",
        "parameter.requires_grad_(is_adapter(key))",
        "parameter.requires_grad_(True)",
        "tests/model/test_lora.py",
    ),
    Mutant(
        "layers computed again with other dropout",
        "rag_core/training/own_draws.py",
        "    generator.set_state(state)\n",
        "",
        RECOMPUTED,
    ),
    Mutant(
        "layers computed again with other kernels",
        "rag_core/training/objectives.py",
        "            with training_kernels(self.model.generator), quiet_transformers():\n",
        "            with quiet_transformers():\n",
        "tests/training/test_resuming.py",
    ),
    Mutant(
        "the base's states rounded with its weights",
        "rag_core/pretrained/rounded_weights.py",
        "lambda module, inputs, output: output.float()",
        "lambda module, inputs, output: output",
        "tests/cpu/test_rounded_weights.py",
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
