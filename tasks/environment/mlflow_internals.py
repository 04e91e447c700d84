"""Private parts of MLflow that we need, in one place. `tests/project/test_internals.py` names one that was moved.

Each function names the public feature that would replace it.
"""

from __future__ import annotations

from typing import Any


def migrations() -> Any:
    """MLflow's Alembic migrations (a `ScriptDirectory`).

    Public replacement: a function that returns the release of a database.
    """
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    return ScriptDirectory.from_config(_get_alembic_config(db_url=""))


def store_schemes() -> set[str]:
    """Schemes of tracking URIs that MLflow or a plugin of it knows. Public replacement: none."""
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    return set(_tracking_store_registry._registry)
