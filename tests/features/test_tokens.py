"""Words of prompts by real tokenizers of every kind that text encoders have."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from diffusers_sae import Site
from diffusers_sae.capture.text import TokenActivations
from diffusers_sae.features.tokens import words_of

CORPUS = [
    "a cat, a dog",
    "the red t-shirt of a cat's owner",
    "don't panic: café, naïve (cats)!",
    "sun flower",
    "A CAT. ...",
] * 3
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]


def unigram():
    """As T5's and Gemma's: the mark of a space begins words, and rare letters are bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>")
    )
    return tokenizer


def sentencepiece_bpe():
    """As Gemma's and Llama's: with bytes for letters that are not in the vocabulary."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁") if letter not in "éï"})
    merges = [("▁", "c"), ("▁c", "a"), ("▁ca", "t"), ("▁", "d"), ("o", "g"), ("▁d", "og"), ("s", ","), ("t", ",")]
    tokens = [*SPECIAL, *byte_tokens, *letters, *("".join(pair) for pair in merges)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def byte_level():
    """As GPT-2's and Qwen's: the space is a part of the token after it, and every byte is a letter."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return tokenizer


def wordpiece():
    """As BERT's: what goes on with a word has a mark, and signs of punctuation are words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL))
    return tokenizer


def clip():
    """CLIP's own class: byte-level, with a mark at the ends of words."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = ["<|startoftext|>", *letters, *(c + "</w>" for c in letters), *map("".join, merges), "<|endoftext|>"]
    return CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges)


def special(make):
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return lambda: PreTrainedTokenizerFast(tokenizer_object=make(), **names)


TOKENIZERS = {
    "clip": clip,
    **{make.__name__: special(make) for make in (unigram, sentencepiece_bpe, byte_level, wordpiece)},
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def read(tokenizer, *prompts):
    """What a text encoder would have seen of the prompts, padded."""
    ids = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in prompts]
    begins, pads = [tokenizer.bos_token_id], [tokenizer.pad_token_id]
    ids = [begins + row + pads * (1 + max(map(len, ids)) - len(row)) for row in ids]
    tensor = torch.tensor(ids)
    return TokenActivations(Site("text_encoder.x"), list(prompts), torch.zeros(*tensor.shape, 1), tensor, tensor > 3)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat, a dog", "a cat a dog"),
        ("a cat,a dog. (cats)!", "a cat a dog cats"),
        ("A CAT", "a cat"),
        ("a cat's t-shirt", "a cat s t shirt"),
        ("don't panic: café", "don t panic café"),
        ("naïve café, cats", "naïve café cats"),
        ("... ,", ""),
    ],
)
def test_words_are_the_same_by_every_tokenizer(tokenizer, prompt, expected):
    words = words_of(read(tokenizer, prompt), tokenizer)
    assert " ".join(word.text for word in words) == expected


@pytest.mark.parametrize("prompt", ["a cat, a dog", "red cats, don't panic"])
def test_every_word_has_its_tokens_and_no_others(tokenizer, prompt):
    seen = read(tokenizer, "a", prompt)
    words = [word for word in words_of(seen, tokenizer) if word.prompt == 1]
    for word in words:
        text = tokenizer.decode(seen.ids[1, list(word.positions)].tolist()).strip().lower()
        assert "".join(letter for letter in text if letter.isalnum()) == word.text
    held = {p for word in words for p in word.positions}
    for p, token in enumerate(seen.ids[1].tolist()):
        if token not in tokenizer.all_special_ids:
            assert any(letter.isalnum() for letter in tokenizer.decode([token])) == (p in held)


def test_letters_of_many_bytes_that_tokens_part():
    tokenizer = special(byte_level)()
    words = words_of(read(tokenizer, "ein 猫咪, हिन्दी и кот 🐈!"), tokenizer)
    assert [word.text for word in words] == ["ein", "猫咪", "हिन्दी", "и", "кот"]
    assert len(words[1].positions) > 2  # three bytes each


def test_a_prompt_that_ends_within_a_letter():
    tokenizer = special(byte_level)()
    ids = read(tokenizer, "cat 猫").ids[:, :-3]
    seen = TokenActivations(Site("text_encoder.x"), ["cat"], torch.zeros(*ids.shape, 1), ids, ids > 3)
    assert [word.text for word in words_of(seen, tokenizer)] == ["cat"]


def test_a_token_that_the_tokenizer_does_not_know_ends_a_word():
    tokenizer = special(unigram)()
    cat, unknown = tokenizer("cat", add_special_tokens=False).input_ids, tokenizer.unk_token_id
    ids = torch.tensor([[*cat, unknown, *cat]])
    seen = TokenActivations(Site("text_encoder.x"), ["cat"], torch.zeros(*ids.shape, 1), ids, ids > 3)
    assert [word.text for word in words_of(seen, tokenizer)] == ["cat", "cat"]
