"""Prompts: files that are read, or refused in one line, and text that is encoded once and read from the disk."""

import shutil
from collections import namedtuple

import pytest
import torch

import prompts
import text
import weights
from commandline import UserError

RED, DOGS = 'a "red" cat', "two dogs, é"


@pytest.mark.parametrize("name, content", [
    ("a.txt", '\ufeffa "red" cat\n\n  two dogs, é \r\n'),
    ("a.jsonl", '{"prompt": "a \\"red\\" cat"}\n\n{"prompt": " "}\n{"prompt": "two dogs, é", "id": 3}'),
    ("a.csv", 'id,Prompt\n1,"a ""red"" cat"\n2,"two dogs, é"\n3\n'),
    ("a.tsv", 'Prompt\tCategory\tNote\na "red" cat\tAnimals\t\ntwo dogs, é\tAnimals\t\n'),  # as PartiPrompts
    ("a.TSV", '\ufeff prompt \n a "red" cat\ntwo dogs, é\n')])
def test_files_of_each_kind_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert prompts.read_prompts(tmp_path / name) == [RED, DOGS]


def test_a_prompt_in_quotes_may_have_a_line_break_and_a_quote_in_a_tsv_is_a_letter(tmp_path):
    (tmp_path / "a.csv").write_text('prompt\n"two\nlines"\na cat\n')
    (tmp_path / "a.tsv").write_text('prompt\n"a cat\na dog"\n')
    assert prompts.read_prompts(tmp_path / "a.csv") == ["two\nlines", "a cat"]
    assert prompts.read_prompts(tmp_path / "a.tsv") == ['"a cat', 'a dog"']


@pytest.mark.parametrize("name, content, words", [
    ("a.csv", b'prompt\na cat\n"a dog\na cow\na bird\n', "record 1"),  # an unclosed quote, not one long prompt
    ("a.csv", b"text,style\na cat,photo\n", "no column `prompt`"), ("a.csv", b"", "no column `prompt`"),
    ("a.txt", b" \n\t\n", "holds no prompt"), ("a.txt", "café".encode("latin-1"), "cannot be read"),
    ("a.jsonl", b'{"prompt": "a cat"}\n{"prompt": a dog}\n', "record 1"), ("a.jsonl", b'"a cat"\n', "record 0"),
    ("a.jsonl", b'{"prompt": 7}\n', "cannot be read"),
    ("a.jsonl", b'{"prompt": "half a character: \\ud83d"}\n', "cannot be read"),
    ("a.yaml", b"- a cat\n", "from .txt, .jsonl, .csv and .tsv")])
def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prompts.read_prompts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and words in str(error.value) and "\n" not in str(error.value)


def test_of_a_long_file_the_first_prompts_are_read_and_this_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prompts, "MOST", 3)
    (tmp_path / "a.txt").write_text("a\n\nb\nc\nd\n")
    assert prompts.read_prompts(tmp_path / "a.txt") == ["a", "b", "c"]
    assert "only the first 3 prompts" in capsys.readouterr().err


def test_prompts_are_drawn_from_the_list_or_the_tiny_world_by_the_generator_alone():
    for words in (["a", "b", "c"], None):
        first, again, other = (prompts.draw_prompts(words, 32, torch.Generator().manual_seed(i)) for i in (1, 1, 2))
        assert first == again != other and len(first) == 32 and set(first) <= set(words or first)


# ---------------------------------------------------------------------------------------------------- encoded text

@pytest.fixture
def encoded(make_pair, tmp_path):
    return prompts.EncodedText(tmp_path / "text", make_pair("SD3-Medium", "folder").path, "cpu", torch.float32)


def test_encoded_text_is_what_the_encoders_give(make_pair, encoded):
    words = ["", "a striped red circle", "a/b: c"]
    encoded.encode(words)
    read, expected = encoded(words[::-1]), make_pair("SD3-Medium", "folder").ours.text(words[::-1])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(read, expected, strict=True))
    assert read[0].shape == (3, 27, 224) and read[1].shape == (3, 160)


def test_each_prompt_is_encoded_once_and_a_stopped_run_goes_on_where_it_was(encoded, monkeypatch):
    asked, write, forward = [], weights.write_safetensors, text.TextEncoders.forward
    monkeypatch.setattr(text.TextEncoders, "forward", lambda self, words: asked.extend(words) or forward(self, words))
    monkeypatch.setattr(weights, "write_safetensors", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
                        if len(list(encoded.folder.iterdir())) == 2 else write(*_))
    with pytest.raises(KeyboardInterrupt):
        encoded.encode(["a", "b", "c", "d"], batch=1)
    assert len(list(encoded.folder.iterdir())) == 2
    monkeypatch.setattr(weights, "write_safetensors", write)
    asked.clear()
    encoded.encode({"a", "b", "c", "d", "e"})
    assert sorted(word for word in asked if word) == ["c", "d", "e"]
    asked.clear()
    monkeypatch.setattr(prompts, "load_text_encoders", None)  # not opened, if nothing is missing
    encoded.encode(["a", "e"])
    assert encoded(["e", "a"])[0].shape[0] == 2 and not asked


def test_models_and_dtypes_do_not_share_encoded_text(encoded, tmp_path):
    folders = [prompts.EncodedText(tmp_path / "text", model, "cpu", dtype).folder
               for model in (encoded.model, "owner/name") for dtype in (torch.float32, torch.bfloat16)]
    assert len(set(folders)) == 4 and {folder.parent for folder in folders} == {tmp_path / "text"}


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(encoded, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(2 * 4 * (27 * 224 + 160) - 1))
    with pytest.raises(UserError, match="do not fit"):
        encoded.encode(["a", "b"])
    assert not list(encoded.folder.iterdir())
    encoded.encode(["a"])


def test_a_prompt_that_is_too_long_is_cut_with_one_warning_of_each_encoder(make_pair, capsys):
    encoders = text.load_text_encoders(make_pair("SD3-Medium", "folder").path)
    start = "red circle " * 5 + "on a "  # 12 words, as many as CLIP and T5 both read
    cut = encoders([start + "white background\n" * 99])
    encoders([start + "gray background"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["warning:", "CLIP"], ["warning:", "T5"]]
    assert all("white background" in line and len(line) < 600 for line in lines)
    assert all(torch.equal(one, other) for one, other in zip(cut, encoders([start]))) and not capsys.readouterr().err
