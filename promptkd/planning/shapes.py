"""Read the sizes of a causal language model from its config.json, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS
from promptkd.utils.strict_json import read_object
from promptkd.weights.families import FAMILIES, Family

MODELS = CONFIGS / "models"  # sizes of the paper's models, to plan without downloads
LARGEST = 1 << 40  # Larger sizes in a config.json would leave the range in which floats are exact.
ALIASES = {"gpt2": "gpt2-base", "gpt2-xl": "gpt2-xlarge"}
DROPOUT_RATES = ("dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. Properties count parameters."""

    path: str  # folder of the config.json
    family: Family
    layers: int
    width: int
    heads: int
    key_heads: int  # fewer than `heads` with grouped-query attention
    head_width: int
    inner: int  # feed-forward width
    vocab: int
    positions: int
    tied: bool
    dropout: bool

    @property
    def gated(self) -> bool:
        return self.family.gated

    @property
    def queries(self) -> int:
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_width

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's products, which tensor parallelism divides."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + self.width * self.inner * (3 if self.gated else 2)

    @property
    def layer_vectors(self) -> int:
        """Biases and norms of one layer."""
        if self.gated:
            return 2 * self.width + (self.queries + 2 * self.keys if self.family.qkv_bias else 0)
        return 9 * self.width + self.inner  # six biases of width, the first feed-forward bias, two norms

    @property
    def head(self) -> int:
        return self.vocab * self.width

    @property
    def embeddings(self) -> int:
        """Embedding tables, the last norm, and the head's weight if it is not tied."""
        tables = self.head * (1 if self.tied else 2)
        if self.gated:
            return tables + self.width
        return tables + (self.positions + self.family.extra_positions) * self.width + 2 * self.width

    def parameters(self, tensor: int = 1) -> int:
        """Count the parameters that each of `tensor` ranks holds. Vectors, embeddings and head are replicated."""
        return self.layers * (self.layer_matrices // tensor + self.layer_vectors) + self.embeddings


def find_config(path: str, option: str) -> Path:
    """Find config.json in a model's folder, or the model of that name in configs/models if there is no folder.

    Raises:
        UserError: If neither exists.
    """
    if not path:
        raise UserError(f"{option} is missing: name a model's folder, or a name in {MODELS}")
    own = Path(path) / "config.json"
    if own.is_file():
        return own
    name = Path(path.rstrip("/")).name.lower()
    known = MODELS / ALIASES.get(name, name) / "config.json"
    if Path(path).is_dir() or not known.is_file():
        names = ", ".join(sorted(folder.name for folder in MODELS.iterdir()))
        raise UserError(f"{option} {path}: it has no config.json, and {name} is none of the shapes known: {names}")
    return known


def read_shape(path: str, option: str) -> Shape:
    """Read the shape of the model in folder `path`.

    Raises:
        UserError: If config.json is missing or invalid. The message names `option`.
    """
    file = find_config(path, option)
    config = read_object(file, f"give a readable config.json as {option}")
    kind = config.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"{option} {file}: model_type {kind!r} cannot be planned: one of {', '.join(FAMILIES)} can")

    def size(key: str, default: int | None = None) -> int:
        return _size(config, family.fields.get(key, ""), f"{option} {file}", default)

    width, heads = size("hidden"), size("heads")
    if config.get("word_embed_proj_dim", width) != width:
        raise UserError(f"{option} {file}: embeddings of another width than the layers (OPT-350m) cannot be planned")
    rates = [config[name] for name in DROPOUT_RATES if name in config] or [family.dropout]
    return Shape(
        path=_relative(file.parent),
        family=family,
        layers=size("layers"),
        width=width,
        heads=heads,
        key_heads=size("kv_heads", heads),
        head_width=size("head_dim", width // heads),
        inner=size("ffn", 4 * width if kind == "gpt2" else None),
        vocab=size("vocab"),
        positions=size("positions"),
        tied=family.is_tied(config),
        dropout=any(rates),
    )


def _relative(folder: Path) -> str:
    """Return the path relative to the working directory if the folder is below it."""
    folder = folder.resolve()
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def _size(config: dict[str, Any], name: str, source: str, default: int | None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{source}: it lacks {name}: add it, or name another config.json")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise UserError(f"{source}: {name} is {repr(value)[:40]}: it has to be a whole number above 0")
    return value
