"""The compute nodes' tasks: thin shells over the libraries. Torch is loaded where a step needs it, not here."""

from __future__ import annotations

import contextlib
from typing import Any

from planner.errors import Cancelled, FairshardError, IntegrityError, Unavailable
from planner.names import check_model_name
from workers.queue.claims import Claim, Fenced
from workers.queue.step_task import step_task
from workers.service.services import Services


@step_task("workers.download")
def download(services: Services, claim: Claim) -> dict[str, Any]:
    """Resolve the revision and see that the files are there; with `"download": "full"` fetch them all."""
    params = claim.params
    checkpoint = _checkpoint(services, claim, params["revision"])
    size_bytes = sum(file.size_bytes for file in checkpoint.files.values())
    claim.progress(0, size_bytes, what=f"found {len(checkpoint.files)} files")
    if params.get("download") == "full":
        from workers.downloader import download as fetch

        folder = services.settings.node_dir / "downloads" / claim.claimed.model_name / checkpoint.revision
        fetch(checkpoint, folder, progress=claim.progress)
    return {"revision": checkpoint.revision, "files": len(checkpoint.files), "size_bytes": size_bytes}


@step_task("workers.generate_metadata")
def generate_metadata(services: Services, claim: Claim) -> dict[str, Any]:
    """Profile the checkpoint at the revision that was resolved."""
    from planner.wire.read import profile_to_json
    from workers.generator import generate

    params = claim.params
    checkpoint = _checkpoint(services, claim, claim.result("download")["revision"])
    profile = generate(
        checkpoint,
        batch_size=params["batch_size"],
        sequence_length=params["sequence_length"],
        kv_dtype=params.get("kv_dtype"),
        node_id=services.settings.node_id,
        cache_dir=services.settings.data_dir / "traces",
        lean=True,
        progress=claim.progress,
    )
    services.put_payload(claim.claimed.job_id, "profile", profile_to_json(profile))
    return {
        "revision": profile.revision,
        "total_layers": len(profile.layers),
        "total_compute": profile.total_compute,
        "total_bytes": profile.total_bytes,
        "total_params": profile.total_params,
        "approximate": list(profile.approximate),
        "missing_tensors": None if profile.missing_tensors is None else list(profile.missing_tensors),
    }


@step_task("workers.publish_metadata")
def publish_metadata(services: Services, claim: Claim) -> dict[str, Any]:
    """Publish the profile to the metadata store."""
    from planner.wire.read import profile_from_json
    from workers.uploader import publish

    job_id = claim.claimed.job_id
    profile = profile_from_json(services.get_payload(job_id, "profile"))
    claim.check()
    published = publish(profile, services.store(), kv_dtype=claim.params.get("kv_dtype"), progress=claim.progress)
    record = {
        "store": published.store,
        "path": published.path,
        "commit": published.commit,
        "revision": profile.revision,
        "batch_size": profile.batch_size,
        "sequence_length": profile.sequence_length,
    }
    services.profile_published(profile.model_name, record)
    summary = {name: value for name, value in claim.result("profile").items() if name != "revision"}
    claim.then(job_result={"metadata": record | summary})
    return record


@step_task("workers.split")
def split(services: Services, claim: Claim) -> dict[str, Any]:
    """Cut out this node's shard and prove it."""
    from planner.wire.read import plan_from_json
    from workers.shards.folder import delete_shard
    from workers.shards.manifest import read_manifest
    from workers.shards.peers import find_peers
    from workers.shards.verify import verify
    from workers.splitter import split as cut
    from workers.transfer.digests import WHICH_IS_WRONG
    from workers.transfer.journal import discard_partials

    settings = services.settings
    record = services.plans.get(claim.args["plan_id"])
    plan = plan_from_json(record)
    token = services.user_token(claim.claimed.job_id, claim.params)
    profile = services.plan_profile(claim.args["profile"], token=token)
    checkpoint = _checkpoint(services, claim, claim.args["revision"])
    output = settings.shards_dir / plan.plan_id
    others = [info for info in services.registry.alive() if info["node_id"] != settings.node_id]
    peers = find_peers(
        [info["peer_url"] for info in others if info.get("peer_url")],
        token=settings.peer_token or "",
        model_name=checkpoint.model_name,
        revision=checkpoint.revision,
    )
    layers = set(plan.allocation.get(settings.node_id, ()))
    names = [t.name for layer in profile.layers if layer.name in layers for t in layer.tensors]
    known = services.digests.of(checkpoint.model_name, checkpoint.revision, names)
    try:
        manifest = cut(
            checkpoint,
            profile,
            plan,
            node_id=settings.node_id,
            output=output,
            progress=claim.progress,
            quota_bytes=settings.disk_quota_bytes,
            peers=peers,
            known_digests=known,
            paranoid=bool(claim.args.get("paranoid")),
        )
        if any(file.digest is None for file in manifest.files):
            # A linked file was not read yet, and what nobody read nobody can vouch for.
            try:
                verify(output, rebuild=False, progress=claim.progress).check()
            except IntegrityError:
                delete_shard(output)  # or it would be taken for a finished one
                raise
            manifest = read_manifest(output)
        claim.check()
    except Fenced:
        # Whoever has the step now goes on from what is there.
        raise
    except Cancelled:
        discard_partials(output)
        raise
    found = {tensor.name: tensor.digest for tensor in manifest.tensors if tensor.digest}
    wrong = [name for name, digest in found.items() if known.get(name, digest) != digest]
    if wrong:
        raise IntegrityError(
            f"{wrong[0]} is {found[wrong[0]]} here, on another node {known[wrong[0]]} ({len(wrong)} tensors "
            f"differ; {WHICH_IS_WRONG})",
            details={"tensors": wrong[:20]},
        )
    with contextlib.suppress(Unavailable):  # the shard is no worse for it
        new = {name: digest for name, digest in found.items() if name not in known}
        services.digests.tell(checkpoint.model_name, checkpoint.revision, new)
    return {
        "node_id": settings.node_id,
        "plan_id": plan.plan_id,
        "revision": manifest.revision,
        "path": str(output),
        "layers": list(manifest.layers),
        "tensors": len(manifest.tensors),
        "tensor_bytes": manifest.tensor_bytes,
        "size_bytes": manifest.total_bytes,
        "files": [{"name": f.name, "size_bytes": f.size_bytes, "digest": f.digest} for f in manifest.files],
    }


@step_task("workers.delete_shards")
def delete_shards(services: Services, claim: Claim) -> dict[str, Any]:
    """Delete this node's shard of a plan."""
    from workers.metadata_store.base import check_plan_id
    from workers.shards.folder import delete_shard
    from workers.shards.manifest import read_manifest

    plan_id = check_plan_id(claim.args["plan_id"])
    folder = services.settings.shards_dir / plan_id
    with contextlib.suppress(FairshardError):
        manifest = read_manifest(folder)
        services.digests.drop(manifest.model_name, manifest.revision)
    freed = delete_shard(folder)
    return {"node_id": services.settings.node_id, "plan_id": plan_id, "freed_bytes": freed}


def _checkpoint(services: Services, claim: Claim, revision: str | None) -> Any:
    from workers.downloader import resolve

    return resolve(
        # Again: `resolve` takes folders too, and the ledger is written by whoever has Redis' password.
        check_model_name(claim.claimed.model_name),
        revision=revision,
        # Without one the process uses its own; what is refused then says that the caller needs one.
        token=services.user_token(claim.claimed.job_id, claim.params),
        models_dir=services.settings.models_dir,
    )
