"""Adapter and base -> a standalone model, its verification, and the cards beside it."""
