"""What people look at: tables, pages and pictures of data and runs. Reads no recipe.

inspect   prepared data, example by example: in the terminal, or as html/inspection
summary   what a run prints at its end
plots     curves.png: loss, gates, scores
html/     pages of one file each: inspection (the data), predictions (the answers)
"""
