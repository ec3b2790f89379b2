"""Celery around the ledger: messages, claims, what every worker does beside its tasks."""
