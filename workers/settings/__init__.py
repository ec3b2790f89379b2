"""The settings of a process: declared once, read from the environment here and nowhere else."""

from workers.settings.environment import check_environment, child_env, completing, settings_in_force
from workers.settings.groups import ClientSettings, HubSettings, QueueSettings, Settings, WebSettings
from workers.settings.running import RunSettings

__all__ = [
    "ClientSettings",
    "HubSettings",
    "QueueSettings",
    "RunSettings",
    "Settings",
    "WebSettings",
    "check_environment",
    "child_env",
    "completing",
    "settings_in_force",
]
