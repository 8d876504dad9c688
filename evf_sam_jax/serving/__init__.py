"""A model behind HTTP: what is asked is checked, waits in a queue, and is computed in batches."""
