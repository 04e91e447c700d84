"""Models of a Hugging Face hub: resolve a name to a commit, download its files to a local folder, explain failures.

Nothing is loaded here. `rag_core/pretrained/model_source.py` asks for a folder and loads from it, so Transformers
itself never contacts a hub.
"""
