"""One file = one question asked of the code, or one published table made again: it prints the table and draws the picture."""
