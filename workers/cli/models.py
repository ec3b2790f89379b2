"""fairshard profile, download, publish, convert: from a model to its published metadata."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.profile import lacking
from workers.cli.arguments import adder
from workers.cli.console import Table, emit, progress, say, shown_bytes, shown_flop, shown_memory, write_document

if TYPE_CHECKING:
    from planner.profile import ModelProfile
    from workers.checkpoint.base import Checkpoint

_PROFILE = """\
examples:
  fairshard profile meta-llama/Llama-3.2-1B
  fairshard profile ./my-model --batch-size 8 --sequence-length 4096 --output profile.json
  fairshard profile ./my-model --no-compute        headers and config alone, in a few milliseconds
  fairshard profile owner/pipeline --subfolder text_encoder --variant fp16
"""
_DOWNLOAD = """\
examples:
  fairshard download sentence-transformers/all-MiniLM-L6-v2
  fairshard download meta-llama/Llama-3.2-1B ./llama --revision main
"""
_PUBLISH = """\
examples:
  fairshard publish profile.json                       to METADATA_REPO, or the data folder's store
  fairshard publish profile.json --store me/metadata   to a Hub repository
  fairshard publish plan.json --store ./store          to a folder
"""
_CONVERT = """\
example:
  fairshard convert ./old-model ./new-model            pytorch_model.bin becomes model.safetensors, bit for bit
"""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    add = adder(commands, common)

    command = add("profile", profile, "show what each layer of a model costs", _PROFILE)
    add_source(command)
    add_sizes(command)
    command.add_argument("--kv-dtype", metavar="DTYPE", help="dtype of the KV cache (default: the model's)")
    command.add_argument(
        "--no-compute", action="store_true", help="count FLOP by a general rule instead of a trace; loads no torch"
    )
    command.add_argument("--output", type=Path, metavar="FILE", help="write the metadata there (.json, .yaml)")

    command = add("download", download, "fetch a whole checkpoint", _DOWNLOAD)
    add_source(command)
    command.add_argument("dir", nargs="?", type=Path, metavar="DIR", help="default: the Hub's cache")

    command = add("publish", publish, "publish metadata or a plan", _PUBLISH)
    command.add_argument("file", type=Path, metavar="FILE", help="what `profile --output` or `plan --output` wrote")
    command.add_argument("--store", metavar="owner/name|DIR", help="a Hub repository or a folder")

    command = add("convert", convert, "convert a .bin checkpoint to safetensors", _CONVERT)
    add_source(command)
    command.add_argument("out", type=Path, metavar="OUT", help="folder for the new checkpoint")


def add_source(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add SOURCE, and which revision and part of it is meant."""
    command.add_argument(
        "source", nargs=None if required else "?", metavar="SOURCE", help="a Hub id (owner/name) or a folder"
    )
    command.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the Hub's main)")
    add_part(command)


def add_part(command: argparse.ArgumentParser) -> None:
    """Add --subfolder and --variant."""
    command.add_argument("--subfolder", metavar="FOLDER", help="the folder of the repository that holds the model")
    command.add_argument("--variant", metavar="NAME", help="which weights: bf16 means model.bf16.safetensors")


def add_sizes(command: argparse.ArgumentParser, *, batch: int | None = 1, sequence: int | None = 512) -> None:
    """Add --batch-size and --sequence-length."""
    shown = {True: " (default: as profiled)", False: " (default: %(default)s)"}
    command.add_argument(
        "--batch-size", type=int, default=batch, metavar="N", help=f"sequences in one pass{shown[batch is None]}"
    )
    command.add_argument(
        "--sequence-length", type=int, default=sequence, metavar="N", help=f"tokens of each{shown[sequence is None]}"
    )


def checkpoint_of(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that SOURCE, --revision, --subfolder and --variant name."""
    from workers.downloader import resolve
    from workers.settings import Settings

    source = args.source
    # A folder that is there is meant, even where its path could be a Hub id ("models/llama").
    if source.startswith((".", "/", "~")) or Path(source).is_dir():
        source = Path(source).expanduser()
    return resolve(
        source,
        revision=args.revision,
        subfolder=args.subfolder,
        variant=args.variant,
        models_dir=Settings.from_env().models_dir,
    )


def profile_of(checkpoint: Checkpoint, args: argparse.Namespace, *, compute: bool = True) -> ModelProfile:
    """The profile of a checkpoint at the sizes that the arguments name."""
    from planner.limits import check_batch_size, check_sequence_length
    from workers.generator import generate
    from workers.settings import Settings

    batch = 1 if args.batch_size is None else args.batch_size
    sequence = 512 if args.sequence_length is None else args.sequence_length
    return generate(
        checkpoint,
        batch_size=check_batch_size(batch),
        sequence_length=check_sequence_length(sequence),
        compute=compute,
        kv_dtype=args.kv_dtype,
        cache_dir=Settings.from_env().data_dir / "traces",
        lean=args.lean,
        progress=progress(args),
    )


def profile(args: argparse.Namespace) -> int:
    """Fairshard profile."""
    from planner.wire.read import profile_to_json

    made = profile_of(checkpoint_of(args), args, compute=not args.no_compute)
    obj = profile_to_json(made)
    if args.output is not None:
        write_document(args.output, obj)
        say(args, f"wrote {args.output}")
    if args.json or args.output is None:
        emit(args, obj, _profile_shown(made))
    return 0


def _profile_shown(made: ModelProfile) -> list[str | Table]:
    rows = [
        (
            layer.index,
            layer.name,
            layer.layer_type,
            "not known" if layer.num_params is None else f"{layer.num_params:,}",
            shown_bytes(layer.weight_bytes),
            shown_memory(layer.kv_cache_bytes) if layer.kv_known else "not known",
            shown_flop(layer.compute_required),
        )
        for layer in made.layers
    ]
    head = ("#", "layer", "type", "parameters", "weights", "KV cache", "compute")
    kind = f"{made.model_type or 'unknown type'}, {made.dtype or 'mixed dtypes'}"
    count = "parameters: not known" if made.total_params is None else f"{made.total_params:,} parameters"
    beside = f" ({shown_bytes(made.overhead_bytes)} of it beside packed weights)" if made.overhead_bytes else ""
    size = f"{count}, {shown_bytes(made.total_bytes)}{beside}"
    work = f"{shown_flop(made.total_compute)} for {made.batch_size} × {made.sequence_length} tokens"
    return [
        Table(head, rows, right=("#", *head[3:])),
        "",
        f"{made.model_name} ({kind}) at {made.revision}: {size}, {work}",
        *(f"approximate: {reason}" for reason in made.approximate),
        *lacking(made.missing_tensors),
    ]


def download(args: argparse.Namespace) -> int:
    """Fairshard download."""
    from workers.downloader import download as fetch

    checkpoint = checkpoint_of(args)
    folder = fetch(checkpoint, args.dir, progress=progress(args))
    size = sum(file.size_bytes for file in checkpoint.files.values())
    obj = {
        "model_name": checkpoint.model_name,
        "revision": checkpoint.revision,
        "directory": str(folder),
        "files": len(checkpoint.files),
        "bytes": size,
    }
    what = f"{len(checkpoint.files)} files, {shown_bytes(size)} in {folder}"
    emit(args, obj, [f"{checkpoint.model_name} at {checkpoint.revision}: {what}"])
    return 0


def publish(args: argparse.Namespace) -> int:
    """Fairshard publish."""
    from planner.wire.read import load_file, plan_from_json, profile_from_json
    from workers import uploader
    from workers.metadata_store.open import open_store
    from workers.settings import HubSettings, Settings

    obj = load_file(args.file)
    settings = Settings.from_env()
    spec: str | Path = args.store or settings.metadata_repo or settings.store_dir
    if args.store and (args.store.startswith((".", "/", "~")) or Path(args.store).is_dir()):
        spec = Path(args.store).expanduser()
    store = open_store(spec, token=HubSettings.from_env().token)
    if isinstance(obj, dict) and "split_plan" in obj:
        plan = plan_from_json(obj)
        url = HubSettings.from_env().url(plan.model_name)
        published = uploader.publish_plan(plan, store, model_url=url)
    else:
        made = profile_from_json(obj)
        published = uploader.publish(made, store)
    answer = {"store": str(published.store), "path": published.path, "commit": published.commit}
    emit(args, answer, [f"published {published.path} in {published.store} ({published.commit})"])
    return 0


def convert(args: argparse.Namespace) -> int:
    """Fairshard convert."""
    from workers.converter import convert as convert_checkpoint

    folder = convert_checkpoint(checkpoint_of(args), args.out, progress=progress(args))
    emit(args, {"directory": str(folder)}, [f"wrote {folder}"])
    return 0
