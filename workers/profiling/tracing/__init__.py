"""The only folder that runs a model's code: without weights, on the meta device. Loads torch."""
