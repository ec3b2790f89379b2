"""What a process of the service works with: ledger, registry, plans, tokens, store."""

from workers.service.services import Services

__all__ = ["Services"]
