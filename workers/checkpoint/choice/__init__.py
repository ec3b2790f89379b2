"""Which files of a repository are the model: as transformers' loader decides, or why none can be read."""
