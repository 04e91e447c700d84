"""Ray: its start, workers, training, an index's shards, embedding and answering."""
