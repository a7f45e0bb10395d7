"""Push a run's model, adapter or soft prompt to the Hugging Face hub.

All files are in one commit, so that an interrupted push changes nothing in the repository. A repeated one uploads only
the large files that the hub does not have yet.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from promptkd.config.reporting_options import hub_token
from promptkd.downloads.hub import Unreachable, one_line_errors
from promptkd.errors import UserError
from promptkd.models.adapters import CONFIG
from promptkd.reporting.model_card import PICTURE, Trained, find_trained, model_card, public_name
from promptkd.utils.strict_json import read_object

CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja")  # weights, configurations and tokenizers


def push(path: Path, repo: str, public: bool, option: str) -> None:
    """Push a run's best model, or one folder of a run, and print what is pushed.

    Args:
        path: The folder of the run, or a folder in it.
        repo: The repository. A missing one is created.
        public: Whether anyone may read a repository that is created. The visibility of an existing one does not change.
        option: The option that asked for it, for error messages.

    Raises:
        UserError: There is nothing to push, no token, or the hub refuses or does not answer.
    """
    api, trained = HfApi(token=hub_token(repo, option)), find_trained(path)
    operations = [CommitOperationAdd(name, content) for name, content in files_of(trained, repo).items()]
    print(f"pushing {trained.folder} to {repo}: {', '.join(each.path_in_repo for each in operations)}", flush=True)
    try:
        with one_line_errors(repo):
            repo = api.create_repo(repo, private=not public, exist_ok=True).repo_id
            try:
                commit = api.create_commit(repo, operations, commit_message=f"Upload {trained.folder.name}")
            except RuntimeError as error:  # wraps the error of a file's upload
                raise error.__cause__ or error from None
    except Unreachable as error:
        remedy = f"run promptkd push {trained.folder} --to {repo} later"
        raise UserError(f"{option} {repo}: the hub does not answer ({error}): {remedy}") from None
    print(f"pushed to {commit.commit_url}")


def files_of(trained: Trained, repo: str) -> dict[str, Path | bytes]:
    """Return what is pushed, by file name. Other files in the folder, links and folders are left out.

    A README.md in the folder, which no run writes, takes the place of the generated card.
    """
    files = [path for path in sorted(trained.folder.iterdir()) if path.is_file() and not path.is_symlink()]
    pushed: dict[str, Path | bytes] = {CARD: model_card(trained, repo).encode()}
    pushed |= {path.name: path for path in files if path.suffix in SUFFIXES or path.name == CARD}
    if CONFIG in pushed:  # names the base model by its path on this machine
        config = read_object(trained.folder / CONFIG, "save it again")
        config["base_model_name_or_path"] = public_name(trained.origin)
        pushed[CONFIG] = json.dumps(config, indent=2).encode()
    if (picture := trained.run / PICTURE).is_file():
        pushed[PICTURE] = picture
    return pushed
