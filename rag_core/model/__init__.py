"""The RAG model, its settings and answers, and exchange with Hugging Face."""
