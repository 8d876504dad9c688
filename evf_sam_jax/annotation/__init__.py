"""Masks made of boxes: which boxes, what has been made so far, and the file that comes of it."""
