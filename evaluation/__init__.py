"""What evaluate.py is made of: rows of a table, names of specs, what a weight becomes after training, pictures.

rows, specs, posttrain < sweep < draw. None of it trains anything, and nothing that trains imports it.
"""
