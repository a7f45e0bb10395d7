"""Sizes of a causal language model, from its config.json and transformers' model without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from promptkd.errors import UserError
from promptkd.utils.project import CONFIGS
from promptkd.weights.families import FAMILIES, Family

MODELS = CONFIGS / "models"  # config.json of the paper's models, to plan without downloads
ALIASES = {"gpt2": "gpt2-base", "gpt2-xl": "gpt2-xlarge"}
DROPOUT_RATES = ("dropout", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
MOST_LAYERS = 1024  # Larger numbers in a config.json would take minutes to build.


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and numbers of its parameters."""

    path: str  # folder of the config.json
    family: Family
    layers: int
    width: int  # of the hidden states
    heads: int
    key_heads: int  # fewer than `heads` with grouped-query attention
    head_width: int
    inner: int  # feed-forward width
    vocab: int
    positions: int
    tied: bool
    dropout: bool
    total: int  # parameters of the model
    layer_total: int  # parameters of one layer
    layer_matrices: int  # weights of one layer's products, which tensor parallelism divides

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
    def head(self) -> int:
        """Weights of the head."""
        return self.vocab * self.width

    @property
    def embeddings(self) -> int:
        """Parameters outside of the layers: embedding tables, the last norm, and the head if it is not tied."""
        return self.total - self.layers * self.layer_total

    def parameters(self, tensor: int = 1) -> int:
        """Count the parameters that each of `tensor` ranks holds. Vectors, embeddings and head are replicated."""
        return self.total - self.layers * (self.layer_matrices - self.layer_matrices // tensor)


def find_model(path: str, option: str) -> Path:
    """Return a model's folder, or the folder of that name in configs/models if there is none.

    Raises:
        UserError: If neither exists.
    """
    if not path:
        raise UserError(f"{option} is missing: name a model's folder, or a name in {MODELS}")
    if (Path(path) / "config.json").is_file():
        return Path(path)
    name = Path(path.rstrip("/")).name.lower()
    known = MODELS / ALIASES.get(name, name)
    if Path(path).is_dir() or not known.is_dir():
        names = ", ".join(sorted(folder.name for folder in MODELS.iterdir()))
        raise UserError(f"{option} {path}: it has no config.json, and {name} is not a known model: use one of {names}")
    return known


def read_shape(path: str, option: str) -> Shape:
    """Read the shape of the model in folder `path`, without its weights.

    Raises:
        UserError: If config.json is missing or invalid. The message names `option`.
    """
    import torch  # imported late, as transformers, so that --help and wrong options are quick
    from transformers import AutoModelForCausalLM

    from promptkd.models.loading import load_config

    folder = find_model(path, option)
    config = load_config(str(folder), option)
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise UserError(f"{option} {folder}: model_type {config.model_type!r} cannot be planned: use one of {known}")
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    if getattr(config, "word_embed_proj_dim", width) != width:
        raise UserError(f"{option} {folder}: OPT-350m has narrower embeddings and cannot be planned: use another model")
    if layers > MOST_LAYERS:
        raise UserError(f"{option} {folder}: {layers} layers are too many: correct {family.fields['layers']}")
    try:
        with torch.device("meta"):
            parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    except Exception as error:  # Each family refuses sizes that do not go together in its own way.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{option} {folder}: no model has these sizes ({reason}): correct config.json") from None
    layer = [parameter for name, parameter in parameters.items() if family.split(name)[0] == 0]
    return Shape(
        path=_relative(folder),
        family=family,
        layers=layers,
        width=width,
        heads=heads,
        key_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        inner=getattr(config, family.fields["ffn"]) or 4 * width,
        vocab=config.vocab_size,
        positions=config.max_position_embeddings,
        tied=config.tie_word_embeddings,
        dropout=any(getattr(config, name, 0) for name in DROPOUT_RATES),
        total=sum(parameter.numel() for parameter in parameters.values()),
        layer_total=sum(parameter.numel() for parameter in layer),
        layer_matrices=sum(parameter.numel() for parameter in layer if parameter.ndim == 2),
    )


def _relative(folder: Path) -> str:
    """Return the path relative to the working directory if the folder is below it."""
    folder = folder.resolve()
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
