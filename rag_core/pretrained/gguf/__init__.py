"""GGUF files as model sources: check a file, complete what Transformers reads of it, write it as a plain folder, once.

GGUF is llama.cpp's format: weights (mostly quantised), tokenizer and chat template in one file. Everything else in this
project loads plain folders. `rag_core/pretrained/model_source.py` asks `cache.py` for the folder of a file.
"""
