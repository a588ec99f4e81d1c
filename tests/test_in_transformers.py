"""examples/in_transformers.py: the same logits and tokens as ours, and what it refuses."""
import shutil
import sys

import pytest
import torch
from conftest import is_one_sentence, open_gates_at_random, write_tiny
from transformers import AutoModelForCausalLM

from examples import in_transformers
from model import Llama
from router import GATES, GRANULARITIES, LinearRouter, add_routers, capacity, load_routers, save_routers
from support.checked import open_router_file
from weights import InputError


@pytest.mark.parametrize("family", ["grouped queries", "Qwen3", "Phi-3"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_logits_and_tokens_equal_ours(granularity, family, tmp_path):
    write_tiny(tmp_path, family)
    ours, theirs = Llama.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    add_routers(ours, granularity, "1-3")
    open_gates_at_random(ours)
    save_routers(ours, tmp_path / "r.safetensors", [(0.3, 0.9), (0.7, 0.5)])
    load_routers(ours, tmp_path / "r.safetensors", capacity=0.7)
    idx = torch.randint(3, 320, (3, 90))
    dense = theirs(idx).logits
    handles = in_transformers.attach_routers(theirs, tmp_path / "r.safetensors", 0.7, prompt=64)
    with torch.no_grad():
        logits = ours(idx)
        torch.testing.assert_close(theirs(idx).logits, logits, atol=1e-4, rtol=1e-4)
    assert 0.25 < capacity(ours) < 1 and (dense - logits).abs().max() > 0.01
    for handle in handles:
        handle.remove()
    assert torch.equal(theirs(idx).logits, dense)
    in_transformers.attach_routers(theirs, tmp_path / "r.safetensors", 0.7)
    out = theirs.generate(idx[:, :20], max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(out, ours.generate(idx[:, :20], 12))


def test_what_cannot_be_attached(tiny, router_file, tmp_path, monkeypatch):
    theirs, ours = AutoModelForCausalLM.from_pretrained(tiny), Llama.from_pretrained(tiny)
    add_routers(ours, "attn_token", kv="open")
    save_routers(ours, tmp_path / "open.safetensors")
    with pytest.raises(InputError, match="kv 'open'"):
        in_transformers.attach_routers(theirs, tmp_path / "open.safetensors")
    monkeypatch.setitem(GATES, "attached", type("Attached", (LinearRouter,), {"attach": print}))
    save_routers(add_routers(Llama.from_pretrained(tiny), gate="attached"), tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="'attached' does more"):
        in_transformers.attach_routers(theirs, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="no calibration"):
        in_transformers.attach_routers(theirs, router_file("attn_token"), capacity=0.5)
    for key, value in ("granularity", "attn"), ("granularity", "foo_token"), ("pool", "x"), ("kv", "x"):
        file, meta = open_router_file(router_file("attn_token"))
        meta[key] = value
        monkeypatch.setattr(in_transformers, "open_router_file", lambda path, opened=(file, meta): opened)
        with pytest.raises(InputError, match=f"{key} '{value}' is not one of"):
            in_transformers.attach_routers(theirs, "r.safetensors")
    monkeypatch.setattr(in_transformers, "open_router_file", open_router_file)
    handles = in_transformers.attach_routers(theirs, router_file("attn_sequence"))
    idx, mask = torch.randint(3, 320, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    theirs(idx, attention_mask=mask)
    mask[0, :3] = 0
    with pytest.raises(InputError, match="padding"):
        theirs(idx, attention_mask=mask)
    for handle in handles:
        handle.remove()
    theirs.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="num_hidden_layers is 4, not 3"):
        in_transformers.attach_routers(theirs, router_file("attn_token"))


def test_the_script(tiny, router_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["in_transformers.py", str(tiny), str(router_file("attn_token")), "fox"])
    in_transformers.main()
    said = capsys.readouterr().out
    assert said.startswith("dense: ") and "\nrouted: " in said
    monkeypatch.setattr(in_transformers, "fetch_smollm2", lambda: tiny)
    sys.argv[1] = "smollm2-135m"
    in_transformers.main()
    assert capsys.readouterr().out == said
    shutil.copytree(tiny, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\1" * 99)
    for model, routers, text, named in ((tmp_path / "cut", router_file("attn_token"), "fox", "cut"),
                                        (tiny, "none.safetensors", "fox", "none.safetensors"),
                                        (tiny, router_file("attn_token"), "", "empty"),
                                        (tmp_path / "none", router_file("attn_token"), "fox", "none")):
        monkeypatch.setattr(sys, "argv", ["in_transformers.py", str(model), str(routers), text])
        with pytest.raises(InputError) as e:
            in_transformers.main()
        assert is_one_sentence(str(e.value)) and named in str(e.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="not installed"):
        in_transformers.main()
