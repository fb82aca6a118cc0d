"""What a recipe will cost, and what is wrong with it, before anything is loaded: arithmetic alone, no torch.

check           the first records of every source, and what is trained
memory          a model and how it is trained (Setup) -> weights, adapters, optimiser states
graph           a forward as operations on sizes -> the most that forward and backward hold
idefics_graph   IDEFICS's forward as such operations
estimate        all of it together: plan(), and the Planner that judges changed recipes
suggest         the smallest changes that make a recipe fit
lengths         the rows of data that is prepared already
report          a plan as tables and as a picture
"""
