"""Configurations of the structure of a released model that train in a second."""

from modeling.shapes import TINY, Config


def stand_in(config: Config) -> Config:
    """A config of the same structure (intervals, resampler, added rows) that trains in a second: for tests."""
    interval = config["cross_layer_interval"]
    return {
        **config,
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2 * interval,
        "num_attention_heads": 4,
        "alpha_initializer": "ones",
        "vision_config": {**config["vision_config"], **TINY["vision_config"], "num_hidden_layers": 2},
        "perceiver_config": {**config["perceiver_config"], **TINY["perceiver_config"], "resampler_depth": 2},
    }
