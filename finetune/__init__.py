"""Instruction fine-tuning for IDEFICS: files in, instruct model out."""

__version__ = "0.1.0"
