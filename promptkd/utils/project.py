"""Where the package's configuration files and the checkout are."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

PACKAGE = Path(str(resources.files("promptkd")))
CONFIGS = PACKAGE / "configs"


def project_root() -> Path:
    """Return the checkout that the package is imported from, or the working directory for an installed package."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "pyproject.toml").is_file() else Path.cwd()
