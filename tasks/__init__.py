"""Prefect tasks: the only place that touches Ray and MLflow."""

# First of all: it switches usage reports off, and the tools look at that when they are imported.
import rag_core  # noqa: F401
