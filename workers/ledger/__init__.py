"""Jobs and their steps in Redis. Messages only wake; what is written here is the truth."""

from workers.ledger.ledger import Ledger
from workers.ledger.steps import ENDED, Claimed, StepSpec, Submission, Wakeup

__all__ = ["ENDED", "Claimed", "Ledger", "StepSpec", "Submission", "Wakeup"]
