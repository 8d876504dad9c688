"""EfficientSAM: a plain ViT and SAM's decoder with GELU; files named as in the original."""
