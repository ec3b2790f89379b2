"""A plan in words, and why there is none."""

from planner.explain.words import explain

__all__ = ["explain"]
