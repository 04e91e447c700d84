"""EM, F1, recall@k, and the predictions artifact."""
