"""Use a model: chat on the terminal, and answer a file of prompts."""
