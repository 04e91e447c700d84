"""The commands of `rag`, one module per group."""
