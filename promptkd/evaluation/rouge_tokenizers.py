"""Tokenizers for ROUGE-L: rouge_score's, which keeps a-z and 0-9 only, and one for the text of any script."""

from __future__ import annotations

import functools
import unicodedata

import regex
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from promptkd.config.options import RougeTokenizer

# Scripts that put no space between words. Tibetan is not one of them: it marks the end of each syllable.
SPACELESS = (
    r"[[\p{scx=Han}\p{scx=Hiragana}\p{scx=Katakana}\p{scx=Bopomofo}\p{sc=Yi}\p{sc=Tangut}\p{sc=Nushu}\p{sc=Khitan_Small_Script}"
    r"\p{sc=Thai}\p{sc=Lao}\p{sc=Khmer}\p{sc=Myanmar}\p{sc=Tai_Le}\p{sc=New_Tai_Lue}\p{sc=Tai_Tham}\p{sc=Tai_Viet}"
    r"\p{sc=Javanese}\p{sc=Balinese}\p{sc=Batak}]&&[\p{L}\p{Nl}\p{No}]]"
)
_LETTER = regex.compile(r"[\p{L}\p{N}]")
# A character with its marks in a script without spaces; else a run of letters, marks and digits.
WORD = rf"(?={SPACELESS})\X|(?!{SPACELESS})[\p{{L}}\p{{N}}](?:(?!{SPACELESS})[\p{{L}}\p{{M}}\p{{N}}])*"
_WORDS = regex.compile(WORD, regex.V1)
_WORDS_AND_SYMBOLS = regex.compile(rf"{WORD}|(?!\s)\X", regex.V1)
_ASCII_WORDS_AND_SYMBOLS = regex.compile(r"[a-z0-9]+|[^\sa-z0-9]")  # the same for ASCII, but fast
_BESIDE_SPACELESS = regex.compile(rf"\s+(?={SPACELESS})|(?<={SPACELESS}\p{{M}}*)\s+", regex.V1)

# NFKC would join superscripts and fractions to the number before them: 2¹⁰ would be 210, and 1½ would be 11/2.
_FOLDABLE = regex.compile(r"[^\p{dt=Super}\p{dt=Sub}\p{dt=Fraction}]+")
_DIGITS = regex.compile(r"[\p{Nd}--[0-9]]", regex.V1)
_ZERO_WIDTH_SPACE = "\u200b"  # separates words in Khmer and Thai; the other invisible characters stand within words
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_VARIATION_SELECTORS = regex.compile(r"\p{Variation_Selector}")


def fold(text: str) -> str:
    """Return `text` with one spelling for what reads the same: NFKC, no case, digits 0-9. ASCII is only lowercased."""
    if text.isascii():
        return text.lower()
    text = _fold_compatible(_fold_compatible(text).casefold())
    return _DIGITS.sub(lambda digit: str(unicodedata.decimal(digit[0])), text).replace("i\u0307", "i")  # Turkish İ


def _fold_compatible(text: str) -> str:
    text = _FOLDABLE.sub(lambda part: unicodedata.normalize("NFKC", part[0]), text)
    return unicodedata.normalize("NFC", text)


def strip_invisible(text: str) -> str:
    """Remove joiners, direction marks, soft hyphens and variation selectors; a zero-width space becomes a space."""
    return _INVISIBLE.sub("", text.replace(_ZERO_WIDTH_SPACE, " "))


def join_spaceless(text: str) -> str:
    """Remove spaces beside characters of scripts that need none: "Python 是" and "Python是" are the same text."""
    return _BESIDE_SPACELESS.sub("", text)


def has_word(text: str) -> bool:
    """Return whether `text` has a letter or a digit of any script."""
    return _LETTER.search(text) is not None


def split_words(text: str) -> list[str]:
    """Split text of any script into words and symbols, without case and not stemmed."""
    pattern = _ASCII_WORDS_AND_SYMBOLS if text.isascii() else _WORDS_AND_SYMBOLS
    return pattern.findall(strip_invisible(fold(text)))


class UnicodeTokenizer(Tokenizer):
    """Split text of any script into words; ASCII text has exactly rouge_score's tokens.

    Scripts without spaces are split into characters, each with its marks. Other scripts are split into words.
    Words of a-z and 0-9 are stemmed as rouge_score stems them. Punctuation and symbols separate words.
    """

    def __init__(self) -> None:
        self._ascii = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self._ascii.tokenize(text)
        return self._stem(_WORDS.findall(strip_invisible(fold(text))))

    def _stem(self, words: list[str]) -> list[str]:
        return [token for word in words for token in (self._ascii.tokenize(word) if word.isascii() else [word])]


class SymbolTokenizer(UnicodeTokenizer):
    """Split text into words and symbols, for references such as "+-*/" or an emoji that have no word."""

    def tokenize(self, text: str) -> list[str]:
        pieces = _WORDS_AND_SYMBOLS.findall(_VARIATION_SELECTORS.sub("", fold(text)))
        return [token for piece in pieces for token in (self._stem([piece]) if has_word(piece) else [piece])]


@functools.cache
def tokenizer_for(name: RougeTokenizer, words: bool) -> Tokenizer:
    """Return the tokenizer of that name for a reference with or without words."""
    if name == "published":
        return DefaultTokenizer(use_stemmer=True)
    return UnicodeTokenizer() if words else SymbolTokenizer()
