"""The recipe: its schema, how a file is read, and the recipes that ship. Knows no data and no torch."""
