"""A model in use: a conversation on the terminal, and answers to a file of prompts."""
