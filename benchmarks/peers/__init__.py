"""What public implementations of RAG compute on one tiny example, beside ours; docs/peers.md explains the result."""
