"""The recipe: its schema, loading from a file, and the recipes that ship. Imports neither data/ nor torch."""
