"""One request's time: a chain with the least sum of layers and hops."""
