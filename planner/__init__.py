"""Decides: what a model costs, what machines offer, who holds what. Pure Python and numpy."""
