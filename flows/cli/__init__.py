"""The command line `rag`. It is the top floor: no other floor imports it."""
