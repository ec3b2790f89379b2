"""Where metadata and plans are published: a Hub repository (`owner/name`) or a folder."""

from workers.metadata_store.base import MetadataStore, plan_path, profile_path
from workers.metadata_store.open import open_store

__all__ = ["MetadataStore", "open_store", "plan_path", "profile_path"]
