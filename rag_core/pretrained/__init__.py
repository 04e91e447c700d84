"""Where weights come from: folders, Python packages, the Hugging Face hub."""
