"""Several chains from one cluster, each of which holds the whole model."""

from planner.replicas.make import Replicas, check_replicas, make_replicas
from planner.replicas.to_json import replicas_to_json

__all__ = ["Replicas", "check_replicas", "make_replicas", "replicas_to_json"]
