"""Published weights: their files read, checked and renamed into the trees of dar_jax.models, and back."""
