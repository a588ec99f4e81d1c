"""examples/lora.py: what trains, what is written, what is refused."""
import sys
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from safetensors.torch import load_file
from test_router import routed, tokens
from transformers import AutoModelForCausalLM

from losses import backward
from model import Llama
from router import capacity, load_routers
from support.batches import Batch
from support.data import Sample

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import lora


def samples_of(idx):
    return [Sample(row, [i >= 9 for i in range(len(row))], 9) for row in idx.tolist()]


@pytest.mark.parametrize("granularity", [None, "attn_token", "mlp_token"])
def test_only_low_rank_updates_train_and_reach_every_layer(granularity, tiny):
    """Also below the first router, and where there is none."""
    model = Llama.from_pretrained(tiny).requires_grad_(False)
    if granularity:
        model = routed(tiny, granularity, layers="2-3")
    lora.add_lora(model, 3, 6.0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 4 * 4 and all(name.endswith((".A", ".B")) for name in trained)
    backward(model.train(), Batch.of(samples_of(tokens(2, 30)), "cpu"), "ce")
    for name, p in model.named_parameters():
        assert (p.grad is not None) == (name in trained)
        if name in trained:                                    # B is 0, and A has no gradient yet
            assert bool(p.grad.abs().sum() > 0) == name.endswith(".B"), name


def test_gradients_are_those_of_the_product_in_float64(tiny):
    """W + scale B A: dL/dB = scale dL/dW A^T, dL/dA = scale B^T dL/dW."""
    model, batch = Llama.from_pretrained(tiny).double(), Batch.of(samples_of(tokens(2, 30)), "cpu")
    lora.add_lora(model.requires_grad_(False), 3, 6.0)
    updates = [module for module in model.modules() if isinstance(module, lora.LowRank)]
    for update in updates:
        torch.nn.init.normal_(update.double().B, std=0.1)
    backward(model.train(), batch, "ce")
    lora.merge(model)
    model.requires_grad_(True)
    backward(model, batch, "ce")
    for update, linear in zip(updates, lora.linear_layers(model)):
        assert torch.allclose(update.B.grad, 2 * linear.weight.grad @ update.A.T, rtol=1e-6)
        assert torch.allclose(update.A.grad, 2 * update.B.T @ linear.weight.grad, rtol=1e-6)


def test_the_script_writes_models_that_transformers_reads(arguments, router_file, tmp_path, call):
    file = router_file("attn_token")
    flags = [*arguments[:4], "--routers", file, "--steps", 12, "--rank", 4]
    status, said = call(lora.main, *flags, "--tokens", 256, "--lr", 0.01, "--out", tmp_path / "lora")
    assert status == 0, said
    losses = {line[:14].strip(): float(line[14:22]) for line in said.splitlines()[-4:]}
    assert losses["dense + LoRA"] < losses["dense"] and losses["routed + LoRA"] < losses["routed"]
    idx = tokens(2, 20)
    for name in "dense", "routed":
        ours = Llama.from_pretrained(tmp_path / "lora" / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "lora" / name)
        with torch.no_grad():
            assert (ours(idx) - theirs(idx).logits).abs().max() < 1e-4
    before = load_file(file)
    after = load_file(tmp_path / "lora" / "routed" / "routers.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    load_routers(ours, tmp_path / "lora" / "routed" / "routers.safetensors")
    ours(idx)
    assert 0 < capacity(ours) < 1


@pytest.mark.parametrize("rank", [0, -1, 49])
def test_an_impossible_rank_is_refused(rank, arguments, router_file, call):
    status, said = call(lora.main, *arguments[:4], "--routers", router_file("attn_token"), "--rank", rank)
    assert status == 1 and is_one_sentence(said) and "from 1 to 48" in said


def test_a_router_file_is_refused_before_any_work(arguments, call, tmp_path):
    status, said = call(lora.main, *arguments[:4], "--routers", tmp_path / "none", "--out", tmp_path / "lora")
    assert status == 1 and is_one_sentence(said) and "missing" in said and not (tmp_path / "lora").exists()


def test_where_it_cannot_write_is_told_first(arguments, router_file, call, tmp_path):
    flags = [*arguments[:4], "--routers", router_file("attn_token")]
    status, said = call(lora.main, *flags, "--out", "/dev/null/lora")
    assert status == 1 and is_one_sentence(said) and "/dev/null/lora" in said
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "dense").symlink_to(arguments[1])
    status, said = call(lora.main, *flags, "--out", tmp_path / "lora")
    assert status == 1 and is_one_sentence(said) and "write over its model" in said


def test_it_does_not_write_over_the_routers_that_it_reads(arguments, router_file, call, tmp_path):
    path = tmp_path / "lora" / "routed" / "routers.safetensors"
    path.parent.mkdir(parents=True)
    router_file("attn_token").rename(path)
    before = path.read_bytes()
    status, said = call(lora.main, *arguments[:4], "--routers", path, "--out", tmp_path / "lora")
    assert status == 1 and is_one_sentence(said) and "write over the routers" in said
    assert path.read_bytes() == before
