"""The supported model families: names and layout of their tensors, and the fields of their config.json.

This is the only table of families. Models, planning, downloads and the conversion of shards all read it. It is in
`weights`, because `models` imports `weights` and not the other way, and it needs no torch, so that a plan starts
quickly.

The layout of opt, llama, mistral and qwen2 is that of the published shards (compared bit by bit with
`tests/golden/mp`). The published code does not shard gpt2. Its layout here follows the same idea for the fused
`Conv1D`: query, key and value are three blocks of columns, and each block is cut separately. Token embeddings and
`lm_head` are cut along the vocabulary. Those of gpt2 are replicated in every shard, because no useful size divides
50,257.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from promptkd.errors import UserError

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut into shards."""

    axis: int
    unit: str  # a key of `checks.UNITS`. No cut may fall inside of one
    blocks: int = 1  # equal blocks along the axis, each of which is cut separately


@dataclass(frozen=True)
class Family:
    """One model family. Names of tensors are regular expressions. A cut of None means replicated in every shard."""

    base: str  # prefix of all names except lm_head's; files of the bare model omit it
    layer: str  # prefix of a layer's tensors, with the layer's number as its group
    in_layer: dict[str, Cut | None]  # names after the layer's prefix
    outside: dict[str, Cut | None]  # names outside of the layers
    embedding: str  # name of the token embedding
    tied: bool  # default of tie_word_embeddings
    blocks: tuple[str, ...]  # modules of a layer whose input goes to sharded products only
    fields: dict[str, str]  # size -> name of the field in config.json
    gated: bool = False  # two products before the activation, RMS norms and rotary positions
    qkv_bias: bool = False  # biases of query, key and value in a gated family
    extra_positions: int = 0  # rows of a learned position table beyond the number of positions
    relu: bool = False  # the activation is ReLU
    dropout: float = 0.0  # default of the dropout rates

    def is_tied(self, config: Mapping[str, Any] | None) -> bool:
        """Whether lm_head shares its weight with the token embedding, by config.json's content."""
        return bool((config or {}).get("tie_word_embeddings", self.tied))

    def split(self, name: str) -> tuple[int | None, str]:
        """Split a name into the layer's number and the rest, or into (None, name) outside of the layers."""
        match = re.match(self.layer, name)
        return (int(match[1]), name[match.end() :]) if match else (None, name)

    def cut(self, name: str) -> Cut | None:
        """Look up how a tensor is cut. None means replicated.

        Raises:
            UserError: If the family has no such tensor.
        """
        layer, rest = self.split(name)
        for pattern, cut in (self.outside if layer is None else self.in_layer).items():
            if re.fullmatch(pattern, rest):
                return cut
        raise UserError(
            f"the model type has no tensor {name}: check --model_type (adapters and quantized weights "
            "cannot be resharded: merge or dequantize them first)"
        )

    @property
    def head_cut(self) -> bool:
        """Whether lm_head is cut. Then shards hold it even if it is tied, like the published ones."""
        return self.outside[re.escape(HEAD)] is not None


_CONFIG = {
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "positions": "max_position_embeddings",
}

_OPT = Family(
    base="model.",
    layer=r"model\.decoder\.layers\.(\d+)\.",
    in_layer={
        r"self_attn\.[qkv]_proj\.(weight|bias)": Cut(0, "heads"),
        r"self_attn\.out_proj\.weight": Cut(1, "heads"),
        r"self_attn\.out_proj\.bias": None,
        r"fc1\.(weight|bias)": Cut(0, "ffn"),
        r"fc2\.weight": Cut(1, "ffn"),
        r"fc2\.bias": None,
        r"(self_attn|final)_layer_norm\.(weight|bias)": None,
    },
    outside={
        r"model\.decoder\.embed_tokens\.weight": Cut(0, "vocab"),
        re.escape(HEAD): Cut(0, "vocab"),
        r"model\.decoder\.(embed_positions|project_in|project_out)\.weight": None,
        r"model\.decoder\.final_layer_norm\.(weight|bias)": None,
    },
    embedding="model.decoder.embed_tokens.weight",
    tied=True,
    blocks=("self_attn", "fc1"),
    extra_positions=2,  # transformers: OPTLearnedPositionalEmbedding
    relu=True,
    dropout=0.1,
    fields={key: field for key, field in _CONFIG.items() if key not in ("kv_heads", "head_dim")} | {"ffn": "ffn_dim"},
)

_LLAMA = Family(
    base="model.",
    layer=r"model\.layers\.(\d+)\.",
    in_layer={
        r"self_attn\.q_proj\.(weight|bias)": Cut(0, "heads"),
        r"self_attn\.[kv]_proj\.(weight|bias)": Cut(0, "kv_heads"),
        r"self_attn\.o_proj\.weight": Cut(1, "heads"),
        r"mlp\.(gate|up)_proj\.(weight|bias)": Cut(0, "ffn"),
        r"mlp\.down_proj\.weight": Cut(1, "ffn"),
        r"(self_attn\.o_proj|mlp\.down_proj)\.bias": None,
        r"(input|post_attention)_layernorm\.weight": None,
        r"self_attn\.rotary_emb\.inv_freq": None,  # a buffer in older files
    },
    outside={
        r"model\.embed_tokens\.weight": Cut(0, "vocab"),
        re.escape(HEAD): Cut(0, "vocab"),
        r"model\.norm\.weight": None,
    },
    embedding="model.embed_tokens.weight",
    tied=False,
    blocks=("self_attn", "mlp"),
    gated=True,
    fields=_CONFIG,
)

_GPT2 = Family(
    base="transformer.",
    layer=r"transformer\.h\.(\d+)\.",
    in_layer={  # a Conv1D weight has the shape (inputs, outputs)
        r"attn\.c_attn\.weight": Cut(1, "heads", blocks=3),
        r"attn\.c_attn\.bias": Cut(0, "heads", blocks=3),
        r"attn\.c_proj\.weight": Cut(0, "heads"),
        r"mlp\.c_fc\.weight": Cut(1, "ffn"),
        r"mlp\.c_fc\.bias": Cut(0, "ffn"),
        r"mlp\.c_proj\.weight": Cut(0, "ffn"),
        r"(attn|mlp)\.c_proj\.bias": None,
        r"ln_[12]\.(weight|bias)": None,
        r"attn\.(bias|masked_bias)": None,  # buffers in older files: the causal mask
    },
    outside={
        r"transformer\.(wte|wpe)\.weight": None,
        re.escape(HEAD): None,
        r"transformer\.ln_f\.(weight|bias)": None,
    },
    embedding="transformer.wte.weight",
    tied=True,
    blocks=("attn", "mlp"),
    dropout=0.1,
    fields={
        "heads": "n_head",
        "hidden": "n_embd",
        "ffn": "n_inner",
        "vocab": "vocab_size",
        "layers": "n_layer",
        "positions": "n_positions",
    },
)

FAMILIES = {
    "opt": _OPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": replace(_LLAMA, qkv_bias=True),
    "gpt2": _GPT2,
}


def field_names(size: str) -> tuple[str, ...]:
    """List the names that the families' config.json files have for a size, such as "hidden"."""
    return tuple(dict.fromkeys(family.fields[size] for family in FAMILIES.values()))
