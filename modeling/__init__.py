"""IDEFICS as tensors: shapes, towers, loading, adapters, packed attention. Independent of recipes and dialogues."""
