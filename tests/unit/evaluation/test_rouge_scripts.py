"""ROUGE-L and exact match for text of any script, and English as rouge_score has it."""

from __future__ import annotations

import random
import string
import unicodedata

import pytest
from rouge_score.rouge_scorer import RougeScorer

from promptkd.evaluation.rouge import ScoringPool, exact_match, rouge_l, score_all
from promptkd.evaluation.rouge_tokenizers import UnicodeTokenizer

PERFECT = {
    "Chinese": "法国的首都是巴黎。", "Japanese": "東京タワーは日本の首都です。", "Korean": "서울은 한국의 수도이다.",
    "Russian": "Москва столица России.", "Greek": "Η Αθήνα είναι η πρωτεύουσα.", "Arabic": "القاهرة عاصمة مصر",
    "Persian": "می‌خواهم بروم", "Hebrew": "ירושלים היא הבירה", "Hindi": "दिल्ली भारत की राजधानी है",
    "Tamil": "சென்னை தமிழ்நாட்டின் தலைநகரம்", "Thai": "กรุงเทพมหานคร", "Lao": "ວຽງຈັນ", "Khmer": "ភ្នំពេញ",
    "Burmese": "ရန်ကုန်", "Tibetan": "ལྷ་ས་", "Armenian": "Երևան", "Georgian": "თბილისი", "Amharic": "አዲስ አበባ",
    "German": "Über Köln", "French": "à l’été", "Vietnamese": "Hà Nội", "digits": "١٢٣", "emoji": "😀👍🏽",
    "operators": "+-*/", "punctuation": "。", "symbols": "∑→∞", "full width": "ＡＢＣ",
}  # fmt: skip


@pytest.mark.parametrize("text", PERFECT.values(), ids=PERFECT)
def test_rouge_l_perfect_answer_scores_100_in_any_script(text):
    assert rouge_l(text, [text]) == 100
    assert rouge_l(unicodedata.normalize("NFD", text), [unicodedata.normalize("NFC", text)]) == 100
    assert exact_match(unicodedata.normalize("NFD", text), [unicodedata.normalize("NFC", text)]) == 100
    assert rouge_l("", [text]) == exact_match("", [text]) == 0


TOKENS = {
    "法国的首都是巴黎。": "法 国 的 首 都 是 巴 黎",
    "コーヒー、人々": "コ ー ヒ ー 人 々",
    "ﾊﾟﾝ": "パ ン",  # half-width katakana
    "서울은 한국의 수도": "서울은 한국의 수도",
    "Москва — столица": "москва столица",
    "ΟΔΟΣ οδός": "οδοσ οδόσ",  # both forms of sigma
    "दिल्ली है": "दिल्ली है",  # marks stay with their letters
    "ที่นี่": "ที่ นี่",
    "ភ្នំ\u200bពេញ": "ភ្នំ ពេ ញ",
    "Python是一种languages": "python 是 一 种 languag",
    "2024年１２月": "2024 年 12 月",
    "١٢٣ ๔๕ १२": "123 45 12",
    "Über Köln": "über köln",
    "l’été d'Orléans": "l été d orléans",
    "Straße STRASSE": "strass strass",
    "İstanbul": "istanbul",
    "می‌خواهم": "میخواهم",  # with a zero-width non-joiner
    "הוא\u200f צה״ל": "הוא צה ל",  # with a right-to-left mark
    "ﬁne cafe\u0301": "fine café",
    "2¹⁰ 1½ 25℃ ACME™": "2¹⁰ 1½ 25 c acm",
    "don’t “stop”… running": "don t stop run",
    "ok 😀 。": "ok",
    "co\u00adoperate": "cooper",  # as "cooperate": a soft hyphen is not to be seen
}


@pytest.mark.parametrize("text", TOKENS)
def test_unicode_tokenizer_tokens(text):
    assert " ".join(UnicodeTokenizer().tokenize(text)) == TOKENS[text]


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("法国的首都", "法国首都", 100 * 2 * 4 / 9),  # 4 characters in common, of 5 and 4
        ("Москва красивая", "Москва столица России", 100 * 2 / 5),
        ("नई दिल्ली", "दिल्ली", 100 * 2 / 3),
        ("Python是好的", "Python是坏的", 75),  # python 是 _ 的
        ("हिन्द", "हिन्दी", 0),  # another word
        ("ber K ln", "Über Köln", 0),
        ("Über Köln", "ber K ln", 0),
        ("cafe", "café", 0),
        ("The answer is +-*/", "+-*/", 100 * 2 * 4 / (7 + 4)),
        ("+-", "+-*/", 100 * 2 / 3),
        ("👍", "😀", 0),
        ("❤️", "❤", 100),  # with and without a variation selector
        ("!!!", "Yes!!!", 0),  # a reference with words is compared by words
        ("東京", "Tokyo", 0),
    ],
)
def test_rouge_l_value_by_hand(answer, reference, expected):
    assert rouge_l(answer, [reference]) == pytest.approx(expected)


def test_rouge_l_best_reference_counts_in_any_script():
    assert rouge_l("東京", ["+-*/", "Tokyo", "東京"]) == 100
    assert rouge_l("+-*/", ["Tokyo", "+-*/"]) == 100


def published(answer: str, references: list[str]) -> float:
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return 100 * max(scorer.score(text, answer)["rougeL"].fmeasure for text in references)


def random_text(draw: random.Random, beside: str = "") -> str:
    words = "The cats' running_away isn't easily-done 3.14 U.S.A. nationalities x2 (yes) #1 don't; generalizations"
    pieces = [*words.split(), *string.punctuation, *beside, "\n", "\t"]
    return "it " + "".join(draw.choice(pieces) + draw.choice(["", " ", "  "]) for _ in range(draw.randrange(30)))


def test_rouge_l_of_ascii_text_is_that_of_rouge_score_to_the_last_digit():
    draw = random.Random(0)
    for _ in range(300):
        answer, references = random_text(draw), [random_text(draw) for _ in range(draw.randrange(1, 3))]
        assert rouge_l(answer, references) == published(answer, references)


def test_rouge_l_of_english_with_typographic_characters_is_that_of_rouge_score():
    draw = random.Random(1)
    for _ in range(300):
        answer, reference = random_text(draw, "“”‘’–—…•→€™®©\u00a0"), random_text(draw, "“”‘’–—…°×\u2009\u200b")
        assert rouge_l(answer, [reference]) == published(answer, [reference])


def test_rouge_l_published_is_rouge_score_for_any_text():
    for text in [*PERFECT.values(), *TOKENS]:
        assert rouge_l(f"a {text} b", [text, "B"], "published") == published(f"a {text} b", [text, "B"])
    assert rouge_l("法国", ["法国"], "published") == rouge_l("+-*/", ["+-*/"], "published") == 0


def test_rouge_l_is_symmetric_where_both_sides_have_words():
    texts = [text for name, text in PERFECT.items() if name not in ("emoji", "operators", "punctuation", "symbols")]
    for one in texts:
        for other in texts:
            assert rouge_l(f"x {one}", [f"{other} x"]) == pytest.approx(rouge_l(f"{other} x", [f"x {one}"]))


@pytest.mark.parametrize(
    "answer, reference, same",
    [
        ("你好，世界！", "你好,世界", True),
        ("「東京」", "東京", True),
        ("Ｙｅｓ", "yes", True),
        ("ＡＢＣ　１２", "abc 12", True),
        ("don’t", "Don't", True),
        ("¿Qué?", "qué", True),
        ("STRASSE", "straße", True),
        ("Python 是语言", "Python是语言", True),
        ("٣", "3", True),
        ("\ufeffأهلا؟", "أهلا", True),
        ("cafe", "café", False),
        ("你 好", "他好", False),
        ("😀", "👍", False),
        ("2¹⁰", "210", False),
        ("нет", "да", False),
        ("", "+-*/", False),  # nothing would be left of the reference
        ("!!!", "+-*/", False),
        ("...", "。。", False),
        (" +-*/ ", "+-*/", True),
        ("Don't.", "dont", True),
        ("  The  answer.", "the answer", True),
    ],
)
def test_exact_match_in_any_script(answer, reference, same):
    assert exact_match(answer, [reference]) == 100 * same
    assert exact_match(reference, [answer or "..."]) == 100 * same


def test_exact_match_of_ascii_words_is_the_published_one():
    draw = random.Random(2)
    for _ in range(300):
        answer, reference = random_text(draw), random_text(draw)
        answer = draw.choice([answer, reference.upper() + " !", reference.replace("-", "")])
        assert exact_match(answer, [reference]) == exact_match(answer, [reference], "published")
    assert exact_match("", ["+-*/"], "published") == 100


def test_scoring_pool_uses_the_tokenizer():
    pairs = [("法国", ["法国"]), ("The cats", ["the cat"]), ("+-*/", ["+-*/"])]
    with ScoringPool(1) as pool:
        ours, theirs = (pool.submit(pairs, name).result() for name in ("unicode", "published"))
    assert ours == score_all(pairs)
    assert [score.rouge_l for score in ours] == [100, 100, 100]
    assert [score.rouge_l for score in theirs] == [0, 100, 0]
