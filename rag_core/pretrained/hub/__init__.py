"""Models of a Hugging Face hub: a name to a commit, the commit's files to a local folder, failures to paragraphs.

Nothing is loaded here. `rag_core/pretrained/model_source.py` asks for a folder and loads from it, so that Transformers itself never
contacts a hub.
"""
