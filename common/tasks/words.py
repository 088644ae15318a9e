"""Words of a text in any script, for ROUGE."""

from __future__ import annotations

import unicodedata

UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI ")
WORD = ("L", "M", "N")  # first letters of the Unicode categories of letters, marks and digits
MIN_STEMMED = 4  # letters; rouge_score stems longer words than three letters


class WordTokenizer:
    """Splits a text into lower-case words, and into single characters where a script puts no spaces between words.

    The words of an English text are those of rouge_score, which drops every character beyond a-z and 0-9: its ROUGE of
    two equal Chinese texts is 0. English words are stemmed. A text without any letter or digit splits into its signs.
    """

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        spaced = "".join(_with_spaces(character) for character in unicodedata.normalize("NFC", text).lower())
        return [self._stemmed(word) for word in spaced.split()] or [sign for sign in text if not sign.isspace()]

    def _stemmed(self, word: str) -> str:
        return self._stemmer.stem(word) if len(word) >= MIN_STEMMED and word.isascii() else word


def _with_spaces(character: str) -> str:
    """A letter, mark or digit of a spaced script as it is, one of another script between spaces, and else a space."""
    if unicodedata.category(character)[0] not in WORD:
        return " "
    return f" {character} " if unicodedata.name(character, "").startswith(UNSPACED) else character
