"""The special tokens of IDEFICS, and the label of a token that is not supervised.

IDEFICS has LLaMA's vocabulary and "added" tokens behind it, with embeddings of their own: 2 in a base, 3 in an
instruct model. "<image>" is the place of an image; the fake token stands on both sides of each run of images.
"""

BOS, EOS = "<s>", "</s>"
FAKE, IMAGE, END_OF_UTTERANCE = "<fake_token_around_image>", "<image>", "<end_of_utterance>"

ADDED = (FAKE, IMAGE, END_OF_UTTERANCE)
"""The added tokens in the order of their ids, which follow LLaMA's vocabulary; a base has the first two."""

IGNORED = -100
"""The label of a token that is not supervised: torch's own `ignore_index`."""
