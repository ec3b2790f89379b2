"""A new plan for a changed cluster that moves as little as it can."""

from planner.replan.replanner import Move, Replan, replan

__all__ = ["Move", "Replan", "replan"]
