"""A plan's id: the digest of its document.

That holds what it was made from: a digest of the metadata, the cluster as it was used, and the options.
So an id stands for one document for ever: what differs in anything, in what was asked or in what came of it, has
another id; what is equal has the same, whoever makes it and when.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

from planner.megaphone import digest, named
from planner.plan import Plan
from planner.profile import ModelProfile
from planner.wire.write import plan_to_json, profile_to_json


def metadata_digest(profile: ModelProfile) -> str:
    """`sha256:<hex>` of what a plan depends on in metadata.

    That is all but when and where it was made, and where in its files a tensor lies: the revision says that.
    """
    layers = tuple(replace(layer, tensors=()) for layer in profile.layers)
    return digest(profile_to_json(replace(profile, layers=layers, generated_at=None, node_id=None)))


def plan_id(plan: Plan) -> str:
    """16 hex digits of the SHA-256 of the plan's document, less its id and when it was made."""
    bare = replace(plan, plan_id="", generated_at=None, megaphone=named(plan.megaphone, ""))
    document = plan_to_json(bare)
    del document["model_url"]  # where a Hub is, not what the plan is
    text = json.dumps(document, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identified(plan: Plan) -> Plan:
    """The plan under its id."""
    identity = plan_id(plan)
    return replace(plan, plan_id=identity, megaphone=named(plan.megaphone, identity))
