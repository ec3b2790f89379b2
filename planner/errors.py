"""One tree of errors; messages carry the numbers and the remedy.

    FairshardError
      InvalidInput          what was given is wrong; trying again changes nothing
        InvalidCheckpoint   a checkpoint's files contradict themselves or each other
        InvalidMetadata     published metadata or a plan that cannot be read
      NotFound              no such model, plan, job or node
      AccessDenied          gated or private; a token is missing or not enough
      Conflict              the request contradicts the state of things
      Infeasible            no plan exists; says by how much
      LimitExceeded         a limit of this service is reached; trying again later may help
      NodeFailure           this machine cannot: disk full, read-only folder, no memory
      IntegrityError        bytes are not what their digest says
      Unavailable           a server cannot be reached now; trying again may help
      Cancelled             the job was cancelled while this ran

`code` is the machine-readable name that the API and `--json` show; `details` carries the numbers as JSON.
Libraries raise, the ledger retries what is `retryable`, and the web shell translates to HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class FairshardError(Exception):
    """Something that fairshard can explain."""

    code: ClassVar[str] = "error"
    #: Whether the same call may succeed later with nothing changed by the user.
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, *, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())
        self.details: dict[str, Any] = dict(details or {})


class InvalidInput(FairshardError):
    """The input is not valid."""

    code = "invalid_input"


class InvalidCheckpoint(InvalidInput):
    """The checkpoint's files are not valid."""

    code = "invalid_checkpoint"


class InvalidMetadata(InvalidInput):
    """The metadata cannot be read."""

    code = "invalid_metadata"


class NotFound(FairshardError):
    """There is no such thing."""

    code = "not_found"


class AccessDenied(FairshardError):
    """Access is denied: the repository is gated or private."""

    code = "access_denied"


class Conflict(FairshardError):
    """The request contradicts the present state."""

    code = "conflict"


class Infeasible(FairshardError):
    """No plan exists for this model on these nodes."""

    code = "infeasible"


class LimitExceeded(FairshardError):
    """A limit of this service is reached."""

    code = "limit_exceeded"
    retryable = True


class NodeFailure(FairshardError):
    """This node cannot do the work."""

    code = "node_failure"


class IntegrityError(FairshardError):
    """The bytes are not what their digest says."""

    code = "integrity_error"
    retryable = True


class Unavailable(FairshardError):
    """A server cannot be reached now."""

    code = "unavailable"
    retryable = True


class Cancelled(FairshardError):
    """The job was cancelled."""

    code = "cancelled"


def from_code(code: str, message: str, *, details: Mapping[str, Any] | None = None) -> FairshardError | None:
    """The error that another process named by its `code`; None where there is none of this code here."""
    kinds = (kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, FairshardError))
    kind = next((kind for kind in kinds if kind.code == code and kind is not FairshardError), None)
    return None if kind is None else kind(message, details=details)
