"""The words in a list of tokens, whatever the tokenizer."""

from __future__ import annotations

import codecs
import functools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..capture.text import TokenActivations


class Word(NamedTuple):
    """One occurrence of a word: number of its prompt, and the positions of its tokens in it."""

    text: str
    prompt: int
    positions: tuple[int, ...]


def words_of(seen: TokenActivations, tokenizer: Any) -> list[Word]:
    """The words of all prompts in order, in lower case, each with all tokens that hold a part of it.

    A word is a run of letters and digits. Punctuation ends it, as do apostrophes and hyphens, since tokenizers differ
    in whether they keep them: "a cat's t-shirt," holds "a", "cat", "s", "t" and "shirt" by each of them.
    """
    special = set(tokenizer.all_special_ids)
    rows = seen.ids.tolist()
    used = sorted({i for ids in rows for i in ids} - special)
    names = dict(zip(used, tokenizer.convert_ids_to_tokens(used), strict=True))
    spell = SPELLINGS[_marks_of(tokenizer, names.values())]
    pieces = {i: spell(name) for i, name in names.items()}
    found = []
    for prompt, ids in enumerate(rows):
        for text, positions in _words([pieces.get(i) for i in ids]):
            found.append(Word(text, prompt, positions))
    return found


def _words(pieces: Sequence[bytes | None]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Words and the positions of their tokens, from the bytes that each token stands for; `None` ends a word."""
    text, positions = "", set[int]()
    for letter, held in _letters(pieces):
        if letter.isalnum() or (text and unicodedata.category(letter).startswith("M")):  # a mark goes with its letter
            text, positions = text + letter, positions | held
        elif text:
            yield text.lower(), tuple(sorted(positions))
            text, positions = "", set()
    if text:
        yield text.lower(), tuple(sorted(positions))


def _letters(pieces: Sequence[bytes | None]) -> Iterator[tuple[str, set[int]]]:
    """Each letter with the positions of the tokens that hold its bytes; tokens may end in the middle of a letter."""
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), set[int]()
    for position, piece in enumerate(pieces):
        if piece is None:
            decoder.reset()
            held = set()
            yield " ", set()
        for byte in piece or b"":
            letters = decoder.decode(bytes([byte]))
            held.add(position)
            for broken in letters[:-1]:  # bytes before this one that were no letter
                yield broken, held - {position}
            if letters:
                yield letters[-1], {position} if letters[:-1] else held
                held = set()


def _of_clip(token: str) -> bytes:
    """`cat</w>`: the mark ends a word; other characters stand for bytes."""
    return _bytes_of(token.removesuffix("</w>")) + (b" " if token.endswith("</w>") else b"")


def _of_sentencepiece(token: str) -> bytes:
    """`▁cat`: the mark is a space; `<0x41>` is a byte."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()


def _of_byte_level(token: str) -> bytes:
    """`Ġcat`: each character stands for a byte, that of the mark for a space."""
    return _bytes_of(token)


def _of_wordpiece(token: str) -> bytes:
    """`##s`: goes on with the word; without the mark, a token begins one."""
    return token.removeprefix("##").encode() if token.startswith("##") else f" {token}".encode()


SPELLINGS: dict[str, Callable[[str], bytes]] = {
    "</w>": _of_clip,
    "▁": _of_sentencepiece,
    "Ġ": _of_byte_level,
    "##": _of_wordpiece,
}
"""The bytes that a token stands for, by the mark that its tokenizer gives to ends or beginnings of words."""


def _marks_of(tokenizer: Any, tokens: Iterable[str]) -> str:
    """Which of the marks a tokenizer uses: the commonest in its vocabulary, or in `tokens` if it shows none."""
    known = list(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else list(tokens)
    counts = {
        mark: sum(token.endswith(mark) if mark == "</w>" else token.startswith(mark) for token in known)
        for mark in SPELLINGS
    }
    return max(counts, key=lambda mark: counts[mark])


def _bytes_of(token: str) -> bytes:
    """The bytes of a token of byte-level BPE; a token with other characters, one that was added, is plain text."""
    table = _byte_alphabet()
    known = all(letter in table for letter in token)
    return bytes(table[letter] for letter in token) if known else token.encode()


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Which byte each character stands for (GPT-2): printable ones themselves, others those from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
