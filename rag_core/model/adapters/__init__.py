"""LoRA adapters of a generator: adding them, their files, merging them into the base's weights."""
