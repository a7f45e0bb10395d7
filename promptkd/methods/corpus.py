"""A pre-training corpus beside the training examples, for methods with a language-modeling loss."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from promptkd.config.values import at_least, option
from promptkd.data.dataset import ExampleSet
from promptkd.data.token_file import TokenFile
from promptkd.errors import UserError
from promptkd.methods.context import DatasetBundle
from promptkd.models.loading import load_config

if TYPE_CHECKING:
    from promptkd.config.resolve import RunConfig

MAKE_CORPUS = "leave it out (--lm-data-dir=), or run python tools/process_data.py corpus --raw TEXT --tokenizer MODEL"


@dataclass
class CorpusSettings:
    lm_data_dir: str | None = option(
        None, "folder with train_0.bin/.idx of the pre-training corpus (default: no corpus)", numbers=False
    )
    lm_coef: float = option(1.0, "weight of the pre-training loss")

    def __post_init__(self) -> None:
        self.lm_data_dir = self.lm_data_dir or None  # `--lm-data-dir=` after a script's own option removes the corpus
        at_least(0, lm_coef=self.lm_coef)


def with_corpus(bundle: DatasetBundle, config: RunConfig, tokenizer: Any) -> DatasetBundle:
    """Add the corpus that --lm-data-dir names to a run's data sets.

    Raises:
        UserError: It cannot be read, or its rows have more tokens than the student has positions.
    """
    folder = config.method_settings.lm_data_dir
    if folder is None:
        return bundle
    lengths = (config.data.max_prompt_length, config.data.max_length)
    corpus = ExampleSet.open(folder, "train", tokenizer, *lengths, option="--lm-data-dir", make=MAKE_CORPUS)
    student = load_config(config.models.model_path, "--model-path").get_text_config()
    limit = getattr(student, "max_position_embeddings", None)
    prefix = Path(folder) / "train_0"
    if limit is not None and prefix.with_name("train_0.idx").is_file():
        longest = int(TokenFile(prefix).row_lengths().max())
        if longest > limit:
            raise UserError(
                f"--lm-data-dir {folder}: its rows have up to {longest} tokens, the student {limit} positions: remake "
                f"it with tools/process_data.py corpus --max-length {limit}"
            )
    return replace(bundle, corpus=corpus, folders={**bundle.folders, "corpus": folder})
