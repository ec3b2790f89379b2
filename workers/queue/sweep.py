"""Removes what interrupted splits left on this node, once nobody will take it over."""

from __future__ import annotations

from workers.service.services import Services


def sweep(services: Services) -> int:
    """Remove unfinished shards of plans that no unfinished job wants from this node.

    One that is wanted stays: the split that is repeated goes on from it. One that a live process holds stays too.

    Returns:
        How many plans' leftovers were looked at for removal.
    """
    settings = services.settings
    left = {path.name[1:].partition(".partial-")[0] for path in settings.shards_dir.glob(".*.partial-*")}
    if not left:
        return 0
    from workers.transfer.journal import discard_partials

    unwanted = left - services.ledger.plans_wanted(settings.node_id)
    for plan_id in unwanted:
        discard_partials(settings.shards_dir / plan_id)
    return len(unwanted)
