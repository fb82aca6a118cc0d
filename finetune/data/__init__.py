"""Everything before the model: dialogues, text, tokens, pixels, packs. No recipe; no torch before the collator."""
