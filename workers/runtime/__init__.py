"""A shard as a runnable stage of its model. Loads torch."""
