"""What a recipe may say, how it is read, and what is checked of it before any work. No torch."""
