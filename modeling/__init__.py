"""IDEFICS as tensors: shapes, towers, loading, adapters, packed attention. Knows no recipe and no dialogue."""
