"""Answers of a model to questions it was not trained on, and the figures made of them."""
