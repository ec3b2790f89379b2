"""What users can have done, and what they can ask."""

from workers.jobs.jobs import Jobs

__all__ = ["Jobs"]
