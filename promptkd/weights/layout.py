"""How the tensors of each model family are cut into tensor-parallel shards.

The layout of opt, llama, mistral and qwen2 is that of the published shards (compared bit by bit with
`tests/golden/mp`). The published code does not shard gpt2. Its layout here follows the same idea for the fused
`Conv1D`: query, key and value are three blocks of columns, and each block is cut separately. Token embeddings and
`lm_head` are cut along the vocabulary. Those of gpt2 are replicated in every shard, because no useful size divides
50,257.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from promptkd.errors import UserError

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Cut:
    """How a tensor is cut into shards."""

    axis: int
    unit: str  # a key of `checks.UNITS`: no cut may fall inside of one
    blocks: int = 1  # equal blocks along the axis, each of which is cut separately


@dataclass(frozen=True)
class Family:
    """The tensors of one model family. Names are regular expressions. A cut of None means replicated in every shard."""

    base: str  # prefix of all names except lm_head's; files of the bare model omit it
    layer: str  # prefix of a layer's tensors, with the layer's number as its group
    in_layer: dict[str, Cut | None]  # names after the layer's prefix
    outside: dict[str, Cut | None]  # names outside of the layers
    embedding: str  # name of the token embedding
    tied: bool  # default of tie_word_embeddings
    fields: dict[str, str]  # names of the fields in config.json

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
    fields={"heads": "n_head", "hidden": "n_embd", "ffn": "n_inner", "vocab": "vocab_size", "layers": "n_layer"},
)

FAMILIES = {"opt": _OPT, "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "gpt2": _GPT2}


def spans(length: int, blocks: int, size: int, rank: int) -> list[tuple[int, int]]:
    """List the ranges [start, stop) of a complete axis that shard `rank` of `size` holds, in order."""
    block = length // blocks
    part = block // size
    return [(index * block + rank * part, index * block + (rank + 1) * part) for index in range(blocks)]


def pieces(length: int, blocks: int, source: int, target: int, rank: int) -> list[tuple[int, int, int]]:
    """List which ranges of the source shards make up a target shard.

    The sizes need not divide each other: a range may begin in one source shard and end in the next.

    Args:
        length: Length of the complete axis.
        blocks: Number of blocks along the axis.
        source: Tensor-parallel size of the source.
        target: Tensor-parallel size of the target.
        rank: Rank of the target shard.

    Returns:
        (source rank, start, stop) within that shard, in the order of the target.
    """
    result = []
    for start, stop in spans(length, blocks, target, rank):
        overlaps = []
        for shard in range(source):
            offset = 0  # where the current span begins within the source shard
            for low, high in spans(length, blocks, source, shard):
                left, right = max(start, low), min(stop, high)
                if left < right:
                    overlaps.append((left, (shard, offset + left - low, offset + right - low)))
                offset += high - low
        result += [piece for _, piece in sorted(overlaps)]
    return result
