"""The planning problem as arrays, and what all solvers share: items, ties, bounds, counting."""

from planner.problem.arrays import SLACK, Floats, Ints, Problem, build

__all__ = ["SLACK", "Floats", "Ints", "Problem", "build"]
