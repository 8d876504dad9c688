"""SAM-2 and SAM 2.1 for images: Hiera trunk and FPN neck, prompt encoder, mask decoder."""
