"""Prefect tasks: the only place that touches Ray and MLflow."""

# Must come first: it switches usage reports off, and the tools read that when they are imported.
import rag_core  # noqa: F401
