"""From a profile and a cluster to an accepted plan."""

from planner.strategies.make import STRATEGIES, compare, make_plan, max_context, plan_for

__all__ = ["STRATEGIES", "compare", "make_plan", "max_context", "plan_for"]
