"""A causal LM as its config.json describes it: the numbers that decide memory and work, without a weight read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS
from promptkd.utils.strict_json import read_object

MODELS = CONFIGS / "models"  # shapes of the paper's models, for planning without downloads
LARGEST = 1 << 40  # of any size in a config.json: beyond it the sums would leave what floats hold
ALIASES = {"gpt2": "gpt2-base", "gpt2-xl": "gpt2-xlarge"}
GATED = ("llama", "mistral", "qwen2")  # two products before the activation, RMS norms, rotary positions
NAMES = {  # what config.json calls it, where no default exists
    "layers": "num_hidden_layers",
    "width": "hidden_size",
    "heads": "num_attention_heads",
    "inner": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}
GPT2 = {"layers": "n_layer", "width": "n_embd", "heads": "n_head", "vocab": "vocab_size", "positions": "n_positions"}
FIELDS = {"gpt2": GPT2, "opt": {**NAMES, "inner": "ffn_dim"}, **{family: dict(NAMES) for family in GATED}}


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. `path` says where they were read; counts are of parameters."""

    path: str
    family: str
    layers: int
    width: int
    heads: int
    key_heads: int  # heads of keys and values: fewer than `heads` with grouped queries
    head_width: int
    inner: int  # feed-forward width
    vocab: int
    positions: int
    tied: bool  # input embeddings are the head's weight
    dropout: bool

    @property
    def gated(self) -> bool:
        return self.family in GATED

    @property
    def queries(self) -> int:
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        return self.key_heads * self.head_width

    @property
    def layer_matrices(self) -> int:
        """Weights of one layer's products: what tensor parallelism divides."""
        attention = self.width * (2 * self.queries + 2 * self.keys)
        return attention + self.width * self.inner * (3 if self.gated else 2)

    @property
    def layer_vectors(self) -> int:
        """Biases and norms of one layer."""
        if self.gated:
            return 2 * self.width + (self.queries + 2 * self.keys if self.family == "qwen2" else 0)
        return 9 * self.width + self.inner  # q, k, v, output and second feed-forward biases; two norms; first bias

    @property
    def head(self) -> int:
        return self.vocab * self.width

    @property
    def embeddings(self) -> int:
        """Tables and the last norm; the head's weight too where it is one of its own."""
        # OPT's table has two rows more than there are positions (transformers, OPTLearnedPositionalEmbedding).
        positions = {"gpt2": self.positions, "opt": self.positions + 2}.get(self.family, 0) * self.width
        norm = self.width if self.gated else 2 * self.width
        return self.head * (1 if self.tied else 2) + positions + norm

    def parameters(self, tensor: int = 1) -> int:
        """Parameters that each of `tensor` ranks holds: products are cut, vectors, tables and head stand whole."""
        return self.layers * (self.layer_matrices // tensor + self.layer_vectors) + self.embeddings


def find_config(path: str, option: str) -> Path:
    """config.json of a model's folder; where the folder is not there, the shape of that name in configs/models."""
    if not path:
        raise UserError(f"{option} is missing: name a model's folder, or a name in {MODELS}")
    own = Path(path) / "config.json"
    if own.is_file():
        return own
    name = Path(path.rstrip("/")).name.lower()
    known = MODELS / ALIASES.get(name, name) / "config.json"
    if Path(path).is_dir() or not known.is_file():
        names = ", ".join(sorted(folder.name for folder in MODELS.iterdir()))
        raise UserError(f"{option} {path}: no config.json there, and {name} is none of the shapes known: {names}")
    return known


def read_shape(path: str, option: str) -> Shape:
    """The shape of the model in folder `path`. UserError when config.json is missing, broken or lacks a field."""
    file = find_config(path, option)
    config = read_object(file, f"give a readable config.json as {option}")
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FIELDS:
        raise UserError(f"{option} {file}: model_type {family!r} cannot be planned: one of {', '.join(FIELDS)} can")
    sizes = {ours: _count(config, name, file, option) for ours, name in FIELDS[family].items()}
    if family == "gpt2":
        sizes["inner"] = _count(config, "n_inner", file, option, 4 * sizes["width"])
    key_heads = _count(config, "num_key_value_heads", file, option, sizes["heads"])
    head_width = _count(config, "head_dim", file, option, sizes["width"] // sizes["heads"])
    if config.get("word_embed_proj_dim", sizes["width"]) != sizes["width"]:
        raise UserError(f"{option} {file}: embeddings of another width than the layers (OPT-350m) cannot be planned")
    tied = config.get("tie_word_embeddings", family not in GATED)
    rates = ("dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
    defaults = {"gpt2": 0.1, "opt": 0.1}
    found = [config[name] for name in rates if name in config] or [defaults.get(family, 0.0)]
    return Shape(
        _short(file), family, **sizes, key_heads=key_heads, head_width=head_width, tied=tied, dropout=any(found)
    )


def _short(file: Path) -> str:
    """A file's folder, from here where that is shorter."""
    folder = file.parent.resolve()
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)


def _count(config: dict[str, Any], name: str, file: Path, option: str, default: int | None = None) -> int:
    value = config.get(name)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{option} {file}: it lacks {name}: add it, or name another config.json")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= LARGEST:
        raise UserError(f"{option} {file}: {name} is {repr(value)[:40]}: it has to be a whole number above 0")
    return value
