"""The text that a model writes, and the file that keeps it."""
import torch
from conftest import OWN_TEXT
from safetensors.torch import load, save
from test_graph import replay_eagerly

from model import Llama
from support import own_text
from support.graph import graphs_of
from support.own_text import own_text_file, read_ids, write_text
from tokenizer import Tokenizer


def test_what_was_written_is_kept_and_read(tiny, tmp_path, monkeypatch):
    model, path = Llama.from_pretrained(tiny), tmp_path / "kept" / "text.safetensors"
    ids = write_text(model, 5, 20, 3, path)
    assert ids.shape == (5, 20) and torch.equal(ids, write_text(model, 5, 20, 3)) and model.cache is None
    assert torch.equal(load(path.with_stem("text-5x20").read_bytes())["ids"].long(), ids)
    fewer = write_text(model, 2, 20, 3, path)                       # not the first two, and kept beside them
    assert torch.equal(write_text(model, 2, 20, 3), fewer) and not torch.equal(fewer, ids[:2])
    monkeypatch.setattr(Llama, "generate", None)                    # both are read
    assert torch.equal(write_text(model, 5, 20, 3, path), ids)
    assert torch.equal(write_text(model, 2, 20, 3, path), fewer)


def test_as_many_rows_at_once_as_fit(tiny, monkeypatch):
    model, rows, generate = Llama.from_pretrained(tiny), [], Llama.generate
    monkeypatch.setattr(own_text, "rows_that_fit", lambda model, n, n_tokens: 2)
    monkeypatch.setattr(Llama, "generate", lambda self, first, *a, **k: rows.append(len(first))
                        or generate(self, first, *a, **k))
    assert write_text(model, 5, 20, 3).shape == (5, 20) and rows == [2, 2, 1]
    monkeypatch.setattr(own_text.parallel, "gathered", lambda fitting: [*fitting, 3, 1])
    assert write_text(model, 3, 20, 3).shape == (3, 20) and rows[3:] == [1, 1, 1]    # what fits everywhere


def test_a_file_that_does_not_fit_is_written_anew(tiny, tmp_path):
    model, path = Llama.from_pretrained(tiny), tmp_path / "text.safetensors"
    expected = write_text(model, 4, 10, 0)
    for content in (b"", b"x" * 100, save({"other": torch.ones(3)}), save({"ids": torch.ones(4)}),
                    save({"ids": torch.full((4, 10), 320)}), save({"ids": torch.ones(3, 10).int()}),
                    save({"ids": torch.full((4, 10), -1)}), save({"ids": torch.ones(4, 9).int()})):
        path.with_stem("text-4x10").write_bytes(content)
        assert torch.equal(write_text(model, 4, 10, 0, path), expected)
        assert torch.equal(read_ids(path.with_stem("text-4x10")), expected)
    (tmp_path / "file").write_text("")                               # a folder that cannot be
    assert torch.equal(write_text(model, 4, 10, 0, tmp_path / "file" / "text.safetensors"), expected)


def test_the_text_that_ships(tmp_path, monkeypatch):
    """288 texts of 256 tokens, whose first tokens are those of seed 0, and which read as text."""
    ids = read_ids(own_text.SHIPPED)
    torch.manual_seed(0)
    assert torch.equal(ids[:, :1], torch.randint(49152, (288, 1))) and ids.shape == OWN_TEXT
    text = Tokenizer.from_pretrained("smollm2-135m").decode(ids[3].tolist())
    assert len(text.split()) > 100
    assert own_text_file("smollm2-135m", 0, "abc") == own_text.SHIPPED
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    which = ("smollm2-135m", 1, "abc"), ("m", 0, "abc"), ("m", 0, "abd")
    others = {own_text_file(*arguments) for arguments in which}
    assert len(others) == 3 and all(tmp_path in path.parents for path in others)


def test_the_graph_that_wrote_it_is_released(tiny, monkeypatch):
    """Its cache would stay allocated while the routers are tuned."""
    made = replay_eagerly(monkeypatch)
    model = Llama.from_pretrained(tiny)
    write_text(model, 3, 12, 0)
    assert len(made) == 1 and model not in graphs_of and model.cache is None
