"""EVF-SAM in JAX/Flax: text-prompted segmentation, trained, evaluated, converted and served."""
