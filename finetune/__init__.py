"""Instruction fine-tuning for IDEFICS: files in, instruct model out."""
