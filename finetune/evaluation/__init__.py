"""Evaluation: a model's answers to eval questions, and their scores."""
