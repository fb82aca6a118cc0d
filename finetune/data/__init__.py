"""Everything before the model: dialogues, text, tokens, pixels, packs. Only the collator imports torch."""
