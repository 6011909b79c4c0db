"""Training: algorithms, their optimizer, and the loop that runs them."""
