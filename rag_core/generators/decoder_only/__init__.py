"""Generators that read the context and write the answer with one stack: Llama, Qwen, Gemma, GPT-2."""
