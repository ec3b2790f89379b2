"""Contiguous stages, node order free."""
