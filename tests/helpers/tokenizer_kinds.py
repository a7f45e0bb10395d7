"""Tokenizers of every kind that models bring, small enough to be made in a test."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parents[1] / "golden"
WORDS = ["word", "data", "teacher", "student", "learns", "the", "stu", "dent", "hi", "alpha", "list", "end", "of"]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = ["<|im_start|>", "<|im_end|>"]


def adding(tokenizer, begins: bool, ends: bool):
    """Let a tokenizer begin texts with <s>, or end them with </s>, when special tokens are asked for."""
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    shape = f"{'<s> ' * begins}$A{' </s>' * ends}"
    tokenizer.add_tokens(AddedToken("</s>", special=True), special_tokens=True)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=shape, special_tokens=ids)
    return tokenizer


def byte_level(begins: bool = False, ends: bool = False, chat: bool = False):
    """Byte-level BPE like GPT-2's: no text is lost, and words have their space in front."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "models/gpt2_student")
    if begins or ends:
        adding(tokenizer, begins, ends)
    return with_turns(tokenizer) if chat else tokenizer


def with_turns(tokenizer):
    """Give a tokenizer ChatML's special tokens and template."""
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    tokenizer.chat_template = CHAT
    return tokenizer


def metaspace(begins: bool = False, ends: bool = False, chat: bool = False):
    """SentencePiece's BPE with bytes, like Llama's: a space is put in front of every text."""
    letters = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyzWTHQ:.!?<>|_/"]
    merges, vocabulary = [], dict.fromkeys(["<unk>", "<s>", "</s>", *letters])
    for word in WORDS:
        for start in ("", "▁"):
            made = start or word[0]
            for letter in word if start else word[1:]:
                merges.append((made, letter))
                made += letter
                vocabulary[made] = None
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    bpe = models.BPE(ids, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = Tokenizer(bpe)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    adding(tokenizer, begins, ends)
    return with_turns(tokenizer) if chat else tokenizer


def word_piece(chat: bool = False):
    """WordPiece like BERT's: texts become lower case, spaces are lost, [CLS] and [SEP] stand around a text."""
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    letters = [*"abcdefghijklmnopqrstuvwxyz:.!?<>|_/[]#"]
    vocabulary = dict.fromkeys([*names, *letters, *WORDS, *(f"##{piece}" for piece in [*letters, *WORDS])])
    made = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    around = [(name, vocabulary_id) for vocabulary_id, name in enumerate(names) if name in ("[CLS]", "[SEP]")]
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=around)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        eos_token="[SEP]", bos_token="[CLS]",
    )  # fmt: skip
    return with_turns(tokenizer) if chat else tokenizer


def unigram():
    """SentencePiece's unigram like T5's: spaces are put in front and run together, and </s> stands behind a text."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzWTHQ:.!?<>|_/"]
    pieces = [(piece, -8.0) for piece in letters]
    pieces += [(start + word, -5.0 - len(word) / 10) for word in WORDS for start in ("▁", "")]
    made = Tokenizer(models.Unigram([("<unk>", -20.0), ("</s>", 0.0), *pieces], unk_id=0, byte_fallback=False))
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    ids = [("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=ids)
    return tokenizer


KINDS = {"byte-level": byte_level, "metaspace": metaspace, "word-piece": word_piece, "unigram": unigram}
