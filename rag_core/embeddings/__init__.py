"""Texts to vectors, and the embeddings artifact."""
