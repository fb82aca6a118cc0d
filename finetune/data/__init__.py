"""Everything before the model: dialogues, their text, tokens, pixels, packs. No recipe; no torch before the collator."""
