"""Private parts of other packages that we use are where we look for them. After an upgrade this says what has moved."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The module that uses it, and what it uses.
USED = [
    ("tasks/environment/ray_internals.py", "ray._private.services", "get_ray_address_from_environment"),
    ("tasks/environment/ray_internals.py", "ray._private.services", "start_api_server"),
    ("tasks/environment/ray_internals.py", "ray._private.ray_constants", "DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"),
    ("tasks/environment/ray_internals.py", "ray._private.ray_constants", "ENABLE_RAY_CLUSTER"),
    ("tasks/environment/ray_internals.py", "ray._private.ray_constants", "ENABLE_RAY_CLUSTERS_ENV_VAR"),
    ("tasks/environment/ray_internals.py", "ray._private.utils", "estimate_available_memory"),
    ("tasks/environment/ray_internals.py", "ray._private.utils", "compute_version_info"),
    ("tasks/environment/ray_internals.py", "ray._raylet", "GcsClient"),
    (
        "tasks/environment/ray_internals.py",
        "ray._private.authentication.authentication_token_generator",
        "generate_new_authentication_token",
    ),
    (
        "tasks/environment/ray_internals.py",
        "ray._private.authentication.authentication_token_setup",
        "maybe_enable_token_auth_if_token_available",
    ),
    ("tasks/on_ray/train_internals.py", "ray.train.torch.config", "_TorchBackend"),
    ("tasks/on_ray/train_internals.py", "ray.train.torch.config", "_set_torch_distributed_env_vars"),
    ("tasks/environment/mlflow_internals.py", "mlflow.store.db.utils", "_get_alembic_config"),
    (
        "tasks/environment/mlflow_internals.py",
        "mlflow.tracking._tracking_service.utils",
        "_tracking_store_registry",
    ),
    ("tasks/environment/prefect_internals.py", "prefect.server.api.server", "create_app"),
    ("rag_core/pretrained/hub/patience.py", "huggingface_hub.utils._http", "default_client_factory"),
]
PRIVATE = re.compile(r"\bray\._(?:private|raylet)|_TorchBackend|_set_torch_distributed_env_vars|_attn_implementation")
PRIVATE_IMPORT = re.compile(r"^\s*from (?!rag_core|tasks|flows|demo_data)[\w.]+ import (?:\w+, )*_\w+", re.MULTILINE)
THEIR_MODULES = {file for file, _, _ in USED} | {"rag_core/pretrained/attention_choice.py"}


@pytest.mark.parametrize(("file", "module", "name"), USED, ids=[f"{module}.{name}" for _, module, name in USED])
def test_a_private_part_is_where_we_look_for_it(file: str, module: str, name: str) -> None:
    try:
        there = hasattr(importlib.import_module(module), name)
    except ImportError:
        there = False
    assert there, f"{module}.{name} is gone: an upgrade has moved it. Only {file} uses it; mend it there."


def test_transformers_reads_the_attention_of_a_configuration_at_each_call() -> None:
    from transformers.models.bart import modeling_bart

    source = inspect.getsource(modeling_bart.BartAttention.forward)
    assert "self.config._attn_implementation" in source, (
        "Transformers' BART no longer reads config._attn_implementation at each call. Only "
        "rag_core/pretrained/attention_choice.py sets it; choose the attention there in today's way."
    )


def test_prefects_server_is_the_factory_that_we_start() -> None:
    from tasks.environment.prefect_internals import SERVER_APPLICATION

    module, _, name = SERVER_APPLICATION.partition(":")
    assert ("tasks/environment/prefect_internals.py", module, name) in USED


def test_no_other_module_uses_private_parts() -> None:
    for folder in ("rag_core", "tasks", "flows"):
        for path in (ROOT / folder).rglob("*.py"):
            file, source = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
            if file not in THEIR_MODULES:
                used = PRIVATE.findall(source) + PRIVATE_IMPORT.findall(source)
                assert not used, f"{file} uses {used}; move that to one of {sorted(THEIR_MODULES)}"
