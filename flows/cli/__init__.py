"""The command line `rag`, the top floor: nothing imports it."""
