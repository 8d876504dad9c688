"""The neural networks: the only package that knows Flax modules."""
