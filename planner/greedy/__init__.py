"""The strategy `greedy`: any layer on any node."""
