"""Prompts from files as other programs write them."""

import codecs
import json

import pytest

from diffusers_sae import InputError
from diffusers_sae.cli.prompts import read_prompts

PROMPTS = ["a cat, sleeping", "un café", 'a "dog"']
TABLE = 'id,prompt\n1,"a cat, sleeping"\n2,un café\n3,"a ""dog"""\n'
ODD = "a\u2028cat\u0085with\x0ca\x0bhat\x1cand\x1dno\x1edog\u2029"
"""One prompt; `str.splitlines` ends lines at all of these."""


def as_lines(prompts):
    return "".join(json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts)


@pytest.mark.parametrize("name", ["p.txt", "p.TXT", "p"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_where_editors_end_them(tmp_path, name, end):
    (tmp_path / name).write_bytes(end.join([*PROMPTS, "", ODD, "  ", ""]).encode())
    assert read_prompts(tmp_path / name, "prompt") == [*PROMPTS, ODD]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "\n".join(PROMPTS)),
        ("p.csv", TABLE),
        ("p.CSV", TABLE.replace("\n", "\r\n")),
        (
            "p.tsv",
            TABLE.replace(',"a cat', '\t"a cat').replace("2,", "2\t").replace("3,", "3\t").replace("d,p", "d\tp"),
        ),
        ("p.csv", TABLE.replace("d,p", "d;p").replace('1,"', '1;"').replace("2,", "2;").replace("3,", "3;")),
        ("p.jsonl", as_lines(PROMPTS)),
        ("p.JSONL", as_lines(PROMPTS).replace("\n", "\r\n\r\n")),
        ("p.jsonl", "\n".join(map(json.dumps, PROMPTS))),
        ("p.json", json.dumps(PROMPTS)),
        ("p.JSON", json.dumps([{"prompt": prompt, "id": 1} for prompt in PROMPTS], indent=1)),
    ],
)
def test_every_format_in_every_encoding(tmp_path, mark, encoding, name, text):
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert read_prompts(tmp_path / name, "prompt") == PROMPTS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", f'prompt\n"two\nlines"\n\n"{ODD}"\n'),
        ("p.tsv", f'id\tprompt\r\n1\t"two\nlines"\r\n2\t"{ODD}"\r\n'),
        ("p.jsonl", as_lines(["two\nlines", ODD])),
        ("p.json", json.dumps(["two\nlines", ODD], ensure_ascii=False)),
    ],
)
def test_line_ends_inside_of_a_prompt_stay(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode())
    assert read_prompts(tmp_path / name, "prompt") == ["two\nlines", ODD]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("p.txt", b"", "holds no prompts"),
        ("p.txt", b"\n \r\n", "holds no prompts"),
        ("p.csv", b"", "holds no prompts"),
        ("p.csv", b"prompt\n", "holds no prompts"),
        ("p.json", b"[]", "holds no prompts"),
        ("p.json", b"\xef\xbb\xbf", "holds no prompts"),
        ("p.txt", b"caf\xe9\n", r"is no UTF-8 text \(byte 3 is 0xe9\); save it as UTF-8"),
        ("p.txt", b"\xff\xfea\0b", "is no UTF-16 text"),
        ("p.txt", "ab".encode("utf-16-le"), "it holds zero bytes; save it as UTF-8"),
        ("p.csv", b"id,prompt\n1,a cat, red\n", "more cells than its header .*quote the text"),
        ("p.csv", b'prompt\n"a cat\n', r"is no table that can be read \(after line 1: unexpected end of data"),
        ("p.csv", b"id,prompt\n1\n", "Row 1 of .* has no text in the column 'prompt'; it has id, prompt"),
        ("p.csv", b"prompt,prompt\na,b\n", "several columns 'prompt'"),
        ("p.csv", b"Prompt\na\n", "no text in the column 'prompt'; it has Prompt; .* another --column"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', "Row 2 of .* has no text"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"\n', r"is no JSON Lines \(line 3: "),
        ("p.jsonl", b"[1]\n", "Row 1 of .*it has a list"),
        ("p.json", b'{"prompt": "a"}', "holds no list but an object"),
        ("p.json", b'"a"', "holds no list but a string"),
        ("p.json", b"[null]", "Row 1 of .*it has null"),
        ("p.json", b'[{"text": "a"}]', "it has text"),
        ("p.json", b"[" * 100_000, "is no JSON .*recursion"),
        ("p.jsonl", b'"a"\n' + b"[" * 100_000, r"is no JSON Lines \(line 2: .*recursion"),
        ("p.json", b"[", "is no JSON .*or name it .jsonl"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=sentence):
        read_prompts(tmp_path / name, "prompt")


def test_empty_cells_beyond_the_header_are_nothing(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,id\na cat,1,,\n")
    assert read_prompts(tmp_path / "p.csv", "prompt") == ["a cat"]


def test_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match="is a folder; pass a file that can be read"):
        read_prompts(tmp_path, "prompt")
    with pytest.raises(InputError, match="none.txt is not there; check the path"):
        read_prompts(tmp_path / "none.txt", "prompt")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be opened"):
        read_prompts(tmp_path / "file" / "p.txt", "prompt")
