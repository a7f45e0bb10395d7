"""How the tensors of each model family are cut into tensor-parallel shards: the one table everything else reads.

The layout of opt, llama, mistral and qwen2 is that of the published shards (checked bit by bit against
`tests/golden/mp`). The published code knows no gpt2; its layout here follows the same idea for the fused `Conv1D`:
query, key and value are three blocks of columns, each cut by itself. Token embeddings and `lm_head` are cut along the
vocabulary, except gpt2's, which stand whole in every shard: its 50,257 entries divide by no useful size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from promptkd.errors import UserError

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Cut:
    """A tensor is cut along `axis`; `unit` names what a cut must not go through; each of `blocks` is cut by itself."""

    axis: int
    unit: str
    blocks: int = 1


@dataclass(frozen=True)
class Family:
    """Names (regular expressions) and cuts of one family's tensors; None stands for whole in every shard."""

    base: str  # prefix of all names but the head's; files of the bare model leave it out
    layer: str  # prefix of a layer's tensors, the layer's number as its group
    in_layer: dict[str, Cut | None]
    outside: dict[str, Cut | None]
    embedding: str
    tied: bool  # the family's default of tie_word_embeddings
    fields: dict[str, str]  # this family's config.json fields

    def split(self, name: str) -> tuple[int | None, str]:
        """The layer's number and the rest of the name; (None, name) outside the layers."""
        match = re.match(self.layer, name)
        return (int(match[1]), name[match.end() :]) if match else (None, name)

    def cut(self, name: str) -> Cut | None:
        """How `name` is cut, None for whole; UserError for a tensor that this family does not have."""
        layer, rest = self.split(name)
        for pattern, cut in (self.outside if layer is None else self.in_layer).items():
            if re.fullmatch(pattern, rest):
                return cut
        raise UserError(
            f"tensor {name} is not one of this model type's: check --model_type (adapters and quantised weights "
            "cannot be resharded: merge or dequantise them first)"
        )

    @property
    def head_cut(self) -> bool:
        """Whether lm_head is cut: then shards hold it even where it is tied, as the published ones do."""
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
        r"self_attn\.rotary_emb\.inv_freq": None,  # a buffer that older files hold
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
    in_layer={  # a Conv1D's weight is [inputs, outputs]
        r"attn\.c_attn\.weight": Cut(1, "heads", blocks=3),
        r"attn\.c_attn\.bias": Cut(0, "heads", blocks=3),
        r"attn\.c_proj\.weight": Cut(0, "heads"),
        r"mlp\.c_fc\.weight": Cut(1, "ffn"),
        r"mlp\.c_fc\.bias": Cut(0, "ffn"),
        r"mlp\.c_proj\.weight": Cut(0, "ffn"),
        r"(attn|mlp)\.c_proj\.bias": None,
        r"ln_[12]\.(weight|bias)": None,
        r"attn\.(bias|masked_bias)": None,  # buffers that older files hold: the causal mask
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
    """The [start, stop) ranges of a whole axis of `length` that shard `rank` of `size` holds, in their order."""
    block = length // blocks
    part = block // size
    return [(at * block + rank * part, at * block + (rank + 1) * part) for at in range(blocks)]


def pieces(length: int, blocks: int, source: int, target: int, rank: int) -> list[tuple[int, int, int]]:
    """What shard `rank` of `target` takes from `source` shards, in order: (source rank, start, stop) within that shard.

    `length` is the whole axis. Sizes need not divide one another: a part may begin in one shard and end in the next.
    """
    taken = []
    for start, stop in spans(length, blocks, target, rank):
        found = []
        for shard in range(source):
            before = 0  # how much of this shard's axis comes before the span looked at
            for low, high in spans(length, blocks, source, shard):
                left, right = max(start, low), min(stop, high)
                if left < right:
                    found.append((left, (shard, before + left - low, before + right - low)))
                before += high - low
        taken += [piece for _, piece in sorted(found)]
    return taken
