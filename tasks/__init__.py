"""Prefect tasks: the only place that touches Ray and MLflow."""
