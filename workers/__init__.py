"""Does: the four steps, the queue and the command line."""
