"""From files to `Batch`: reading, resizing, tokenising, masks; NumPy only, no device."""
