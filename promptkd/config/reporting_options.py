"""Options that send a run's numbers and models to other programs."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub.utils import HFValidationError, validate_repo_id

from promptkd.config.values import option
from promptkd.errors import UserError

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")


@dataclass
class ReportingSettings:
    report_to: list[str] | None = option(
        None,
        "experiment trackers that get the run's numbers, each an optional package (default: none)",
        choices=TRACKERS,
        metavar=f"{{{','.join(TRACKERS)}}}",
        numbers=False,
    )
    push_to_hub: str | None = option(
        None,
        "repository of the Hugging Face hub that gets the best model after the run, with a model card. A new one is "
        "private. The environment variable HF_TOKEN holds the token (default: push nothing)",
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
        raise UserError(f"{option} {name!r} is not a repository's name such as user/name: {error}") from None
