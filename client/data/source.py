"""A source of rows, and the text of a file in any encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ...common.config.schema import DataSettings
from ...common.errors import DataError

DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BYTE_ORDER_MARKS = (  # the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
WESTERN = "cp1252"  # preferred among equally likely encodings
GUESSED = [  # encodings in wide use; more candidates make short files look like rare encodings
    WESTERN, "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "shift_jis", "euc_jp", "gb18030", "big5",
    "euc_kr", "koi8_r", "utf_16",
]  # fmt: skip
SAMPLE = 1 << 18  # bytes from which an encoding is guessed
COHERENT = 0.1  # charset_normalizer's similarity of letter frequencies with a language
MOSTLY_ASCII = 0.2  # maximum fraction of other bytes


@dataclass(frozen=True)
class Source:
    """What ``data.source`` names, and the settings that say how to read it.

    ``notes`` collects what a reader decided by itself, one sentence each.
    """

    name: str
    data: DataSettings
    site: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """The source as a path."""
        return Path(self.name)

    @property
    def suffix(self) -> str:
        """The lower-case suffix that selects the reader: ``.jsonl`` for ``ROWS.JSONL.GZ``."""
        suffixes = [suffix.lower() for suffix in self.path.suffixes]
        return next((suffix for suffix in reversed(suffixes) if suffix not in DECOMPRESSORS), "")

    def open(self) -> BinaryIO:
        """Open the file for reading, decompressed."""
        return DECOMPRESSORS.get(self.path.suffix.lower(), open)(self.path, "rb")  # type: ignore[operator]

    def error(self, expected: str, found: str, *, message: str | None = None, hint: str | None = None) -> DataError:
        """An error of ``data.source``."""
        message = message and f"data.source: {message}"
        return DataError("data.source", expected, found, site=self.site, message=message, hint=hint)

    def text(self) -> str:
        """Return the text of the file.

        The encoding is ``data.encoding`` or that of a byte order mark, otherwise UTF-8. A file that is none of these is
        read in the most likely encoding, with a note. Raises DataError where the text is damaged or no encoding fits.
        """
        with self.open() as file:
            raw = file.read()
        encoding = self.data.encoding or next((name for mark, name in BYTE_ORDER_MARKS if raw.startswith(mark)), None)
        try:
            return raw.decode(encoding or "utf-8").removeprefix("\ufeff")
        except LookupError:
            message = f"data.encoding: Python knows no encoding {encoding!r}."
            hint = 'Common ones are "utf-8", "cp1252", "utf-16" and "shift_jis".'
            raise DataError(
                "data.encoding", "an encoding", repr(encoding), site=self.site, message=message, hint=hint
            ) from None
        except UnicodeDecodeError as error:
            likely = [] if encoding or _is_mostly_utf8(raw) else _likely_encodings(raw)
            if not likely or not likely[0].certain:
                raise self._undecodable(raw, error, [guess.name for guess in likely]) from None
        name = likely[0].name
        self.notes.append(f"{self.name} is not UTF-8 and was read as {name}; set data.encoding if that is wrong")
        return raw.decode(name)

    def _undecodable(self, raw: bytes, error: UnicodeDecodeError, likely: list[str]) -> DataError:
        line, encoding = raw[: error.start].count(b"\n") + 1, error.encoding
        guesses = f"; it may be {' or '.join(map(repr, likely[:3]))}" if likely else ", or repair the line"
        return self.error(
            f"text in {encoding}",
            f"other bytes in line {line} of {self.name}",
            message=f"line {line} of {self.name} is not valid {encoding}.",
            hint=f"Set data.encoding to the file's encoding{guesses}.",
        )


def _is_mostly_utf8(raw: bytes) -> bool:
    """Whether most characters beyond ASCII are valid UTF-8: the text is damaged rather than in another encoding."""
    text = raw.decode("utf-8", errors="replace")
    broken, beyond_ascii = text.count("\ufffd"), sum(character > "\x7f" for character in text)
    return beyond_ascii - broken > broken


@dataclass(frozen=True)
class Guess:
    """An encoding that decodes a text, and whether it is certain enough to read the text in it."""

    name: str
    certain: bool


def _likely_encodings(raw: bytes) -> list[Guess]:
    """Return encodings that decode all of ``raw``, the most likely first.

    Certain is one whose text is in a known language, and the Western one for a text of mostly ASCII that is too short
    to tell.
    """
    from charset_normalizer import from_bytes

    end = raw.find(b"\n", SAMPLE)  # a cut inside a character would rule out its encoding
    matches = list(from_bytes(raw[: end + 1] if end > 0 else raw, cp_isolation=GUESSED))
    mostly_ascii = sum(byte > 0x7F for byte in raw) < MOSTLY_ASCII * len(raw)
    found = [
        (
            match.chaos,
            -match.coherence,
            name != WESTERN,
            Guess(name, match.coherence >= COHERENT or (mostly_ascii and name == WESTERN)),
        )
        for match in matches
        for name in match.could_be_from_charset
    ]
    return [guess for *_, guess in sorted(found, key=lambda entry: entry[:3]) if _decodes(raw, guess.name)]


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
