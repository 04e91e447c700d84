"""MLflow: runs, the journal for outages, delivery, the registry, names of metrics."""
