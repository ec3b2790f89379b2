"""One blueprint a noun, thin."""
