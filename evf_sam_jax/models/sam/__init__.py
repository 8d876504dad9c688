"""Segment Anything: image encoder, prompt encoder, mask decoder; files named as in the original."""
