"""Output files filled from here, other nodes and the Hub: proven, resumable."""
