"""Options that send a run's numbers and its model to other programs."""

from __future__ import annotations

import os
from dataclasses import dataclass

from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id

from promptkd.config.values import option
from promptkd.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass
class ReportingSettings:
    report_to: list[str] | None = option(
        None, "experiment trackers that get the run's numbers (default: none)", choices=TRACKERS, numbers=False
    )
    push_to_hub: str | None = option(
        None,
        "hub repository that gets the best model after the run, see `promptkd push`. A new one is private. "
        "HF_TOKEN holds the token (default: push nothing)",
        numbers=False,
    )

    def __post_init__(self) -> None:
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, "--push-to-hub")


def check_repository(name: str, option: str) -> None:
    """Raise UserError if a text is not the name of a hub repository."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{option} {name!r} is not a repository's name, such as user/name: {error}") from None


def hub_token(repo: str, option: str) -> str:
    """Return the token of the environment. Raise UserError if nothing can be pushed to a repository of that name."""
    check_repository(repo, option)
    if constants.is_offline_mode():
        raise UserError(f"{option} needs the hub, and HF_HUB_OFFLINE is set: unset it")
    if not (token := os.environ.get("HF_TOKEN")):
        raise UserError(f"{option} needs a token that may write: set the environment variable HF_TOKEN")
    return token
