"""examples/flexidepth.py against its formulas in float64, and the hooks of router.py that it needs."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import bound, greedy_continuation, is_one_sentence, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file
from test_graph import replay_eagerly
from test_router import LENGTHS, PROMPTS, real, tokens
from transformers import AutoModelForCausalLM

import eval as evaluation
import skipping
from examples import flexidepth, in_transformers
from model import Llama, run_layers
from router import (
    GRANULARITIES,
    add_routers,
    capacity,
    close_all,
    dense,
    load_routers,
    mindskips,
    save_routers,
)
from support import graph
from weights import InputError

KINDS = ["gated", "adapter", "flexidepth"]


def routed(folder, gate="flexidepth", granularity="block_token", layers="1-3", **options):
    """A tiny model in float64 with random gates and adapters, about half of the gates open."""
    model = add_routers(Llama.from_pretrained(folder), granularity, layers, gate=gate, **options).double()
    for skip in mindskips(model).values():
        skip.router.double()                 # which else stays in float32
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spread = 0.1 if parameter.dim() == 1 else 1 / parameter.shape[1] ** 0.5
            parameter.data.normal_(float("norm" in name), spread, generator=generator)
    return model


def rms(x, norm):
    return x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def token_by_token(model, layer, x, lengths):
    """What the formulas say of a block: x (B, T, C) -> (the stream after it, g (B, T)), by loops over rows,
    tokens and heads, everything computed; padding is left as it was."""
    skip, config = mindskips(model)[layer], model.config
    block, router, D = skip.sublayer, skip.router, config.head_dim
    frequency = 1 / config.rope_theta ** (torch.arange(0, D, 2) / D)             # angles are float32
    q_weight, kv_weight = block.attn.qkv.weight.split([config.n_head * D, 2 * config.n_kv_head * D])
    k_weight, v_weight = kv_weight.chunk(2)
    gate_weight, up_weight = block.mlp.gate_up.weight.chunk(2)

    def turned(head, t):
        cos, sin = (t * frequency).cos().double(), (t * frequency).sin().double()
        pairs = torch.complex(head[:D // 2], head[D // 2:]) * torch.complex(cos, sin)
        return torch.cat((pairs.real, pairs.imag))

    rows, scores = [], torch.zeros(x.shape[:2]).double()
    for b, n in enumerate(lengths.tolist()):
        z = [rms(x[b, t], block.attn.norm) for t in range(n)]
        row = []
        for t in range(n):
            narrow = torch.tanh(router.down.weight @ z[t])
            narrow = narrow / (narrow.square().mean() + 1e-6).sqrt() * router.norm.weight
            g = 1 / (1 + torch.exp(-(router.weight[0] @ (router.up.weight @ narrow))))
            scores[b, t] = g.detach()
            heads = []
            for h in range(config.n_head):
                group = slice(h * config.n_kv_head // config.n_head * D, None)
                query = turned((q_weight @ z[t])[h * D:h * D + D], t)
                keys = [turned((k_weight @ z[s])[group][:D], s) for s in range(t + 1)]
                share = torch.stack([query @ key / math.sqrt(D) for key in keys]).softmax(0)
                heads.append(sum(share[s] * (v_weight @ z[s])[group][:D] for s in range(t + 1)))
            middle = x[b, t] + block.attn.o.weight @ torch.cat(heads)
            read = rms(middle, block.mlp.norm)
            after = middle + block.mlp.down.weight @ (F.silu(gate_weight @ read) * (up_weight @ read))
            adapted = 0.0
            if hasattr(router, "adapter"):
                gate, up = (router.adapter_in.weight @ rms(x[b, t], block.mlp.norm)).chunk(2)
                adapted = router.adapter_out.weight @ (F.silu(gate) * up)
            is_open = float(g > 0.5)
            of_block, of_adapter = g * is_open, (1 - g) * (1 - is_open)
            if skip.gate_name == "adapter":                    # straight-through
                of_block = is_open + g - g.detach()
                of_adapter = 1 - of_block
            row.append(x[b, t] + of_block * (after - x[b, t]) + of_adapter * adapted)
        rows.append(torch.cat((torch.stack(row), x[b, n:])))
    return torch.stack(rows), scores


@pytest.mark.parametrize("gate", KINDS)
def test_a_block_and_its_gradients_are_those_of_the_formulas(gate, tiny):
    model = routed(tiny, gate)
    lengths, skip = torch.tensor([14, 5, 9]), mindskips(model)[2]
    idx = tokens(3, 14)
    ctx = model.context(idx, lengths)
    is_real = torch.arange(14) < lengths[:, None]
    x = run_layers(model.train().layers[:2], model.embed(idx), ctx).detach()
    up = torch.randn(x.shape).double() * is_real[..., None]
    expected, scores = token_by_token(model, 2, x, lengths)
    (expected * up).sum().backward()
    gradients = {name: parameter.grad for name, parameter in skip.router.named_parameters()}
    model.zero_grad()
    y = skip(x, ctx)
    (y * up).sum().backward()
    assert 0.2 < (scores[is_real] > 0.5).double().mean() < 0.8
    assert (y - expected)[is_real].abs().max() < bound(expected, 96)
    assert torch.equal(skip.gates == 1, (scores > 0.5) & is_real)
    assert len(gradients) == (4 if gate == "gated" else 6)
    for name, parameter in skip.router.named_parameters():
        assert gradients[name].abs().max() > 0
        assert (parameter.grad - gradients[name]).abs().max() < bound(gradients[name], 96)
    with torch.no_grad():
        skipped = skip.eval()(x, ctx)
    assert (skipped - expected)[is_real].abs().max() < bound(expected, 96)


def test_the_price_and_its_gradient(tiny):
    """alpha / tokens * the sum over tokens of (sum over layers of g)^2; the gradient by central differences,
    in which g of a layer also moves what the gates above it read."""
    model, idx = routed(tiny), tokens()
    for skip in mindskips(model).values():
        skip.estimator = flexidepth.RECIPES["flexidepth"].gate_estimator(0, 1)

    def price():
        model.train()(idx, LENGTHS, PROMPTS)
        return flexidepth.squared_price(model, 0.3)

    value = price()
    scores = [skip.gates.detach() for skip in mindskips(model).values()]
    total = 0.0
    for b, n in enumerate(LENGTHS.tolist()):
        for t in range(n):
            total += sum(float(score[b, t]) for score in scores) ** 2
    assert float(value.detach()) == pytest.approx(0.3 * total / int(LENGTHS.sum()), rel=1e-12)
    assert all(float(score[1, 7:].abs().max()) == 0 for score in scores)
    value.backward()
    for layer in 1, 2, 3:
        for parameter in mindskips(model)[layer].router.parameters():
            if parameter.dim() == 2 and (parameter.grad is None or not parameter.grad.any()):
                assert layer == 3                                  # nothing is above the last adapter
                continue
            place = parameter.grad.abs().argmax()
            differences = []
            for step in 1e-6, -2e-6:
                parameter.data.view(-1)[place] += step
                differences.append(float(price().detach()))
            parameter.data.view(-1)[place] += 1e-6
            slope = (differences[0] - differences[1]) / 2e-6
            assert slope == pytest.approx(float(parameter.grad.view(-1)[place]), rel=1e-4)


@pytest.mark.parametrize("gate, granularity, kv, family, forced", [
    *(("flexidepth", "block_token", "all", "grouped queries", forced) for forced in (None, 0.0, 0.3, 0.9)),
    ("flexidepth", "block_token", "all", "Mistral with a window", None),
    ("adapter", "block_token", "all", "grouped queries", None),
    ("flexidepth", "block_token", "open", "SmolLM3", None),
    ("gated", "attn_token", "all", "SmolLM3", None), ("gated", "mlp_token", "all", "SmolLM3", None),
    ("bottleneck", "attn_token", "all", "grouped queries", 0.9)])
def test_skipping_equals_computing_and_masking(gate, granularity, kv, family, forced, tmp_path):
    write_tiny(tmp_path, family)
    model, idx = routed(tmp_path, gate, granularity, kv=kv), tokens()
    if forced is not None:
        for skip in mindskips(model).values():
            skip.override = lambda score, ctx: torch.full_like(score, forced)
    with torch.no_grad():
        masked, there = real(model.train()(idx, LENGTHS, PROMPTS)), capacity(model, routed=True)
        skipped, here = real(model.eval()(idx, LENGTHS, PROMPTS)), capacity(model, routed=True)
        alone = model(idx[2:3, :23])[0]
    assert (masked - skipped).abs().max() < bound(skipped, 96)
    assert (alone - skipped[47:70]).abs().max() < bound(skipped, 96)
    assert there == pytest.approx(here)
    assert 0.1 < here < 0.9 if forced is None else here == (forced > 0.5)
    plain = Llama.from_pretrained(tmp_path).double()
    with torch.no_grad(), dense(model):
        assert torch.equal(model(idx), plain(idx))
    assert (real(plain(idx, LENGTHS)) - skipped).abs().max() > 1e-3 or (gate, forced) == ("bottleneck", 0.9)


@pytest.mark.parametrize("kv, family, pending", [
    ("all", "grouped queries", 32), ("all", "Mistral with a window", 3), ("open", "grouped queries", 32)])
def test_prefill_and_decode_equal_recomputation(kv, family, pending, tmp_path, monkeypatch):
    monkeypatch.setattr(skipping, "PENDING", pending)
    write_tiny(tmp_path, family)
    model, idx = routed(tmp_path, kv=kv), tokens()
    out = model.generate(idx, 12, lengths=LENGTHS)
    used, opened = capacity(model, routed=True), 0
    for b, n in enumerate(LENGTHS.tolist()):
        row = greedy_continuation(model, idx[b, :n], 12)
        with torch.no_grad():
            model(row[None, :-1])
        assert torch.equal(out[b, :n + 12], row)
        opened += capacity(model, routed=True) * (n + 11)
        assert torch.equal(model.generate(idx[b:b + 1, :n], 12)[0], row)
    assert used == pytest.approx(opened / (int(LENGTHS.sum()) + 8 * 11)) and 0.1 < used < 0.9


def test_the_adapter_reads_closed_tokens_alone(tiny):
    model, idx, seen = routed(tiny, layers="2"), tokens(), []
    skip = mindskips(model)[2]
    skip.router.adapter_in.register_forward_hook(lambda layer, args, y: seen.append(len(y)))
    with torch.no_grad():
        model(idx)
    assert seen == [idx.numel() - int(skip.opened)] and 0 < seen[0] < idx.numel()
    seen.clear()
    model.generate(idx, 9)
    assert sum(seen) == skip.seen - int(skip.opened) and skip.seen == idx.numel() + 8 * 8
    skip.override = close_all
    seen.clear()
    model(idx)
    assert seen == [idx.numel()] and capacity(model, routed=True) == 0


def test_new_gates_are_open_and_every_parameter_learns(tiny):
    model = add_routers(Llama.from_pretrained(tiny), "block_token", gate="flexidepth")
    with torch.no_grad():
        model(tokens(), LENGTHS)
    assert capacity(model) == 1
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 4 * 6 and all(".router." in name for name in names)
    assert all(parameter.dtype == torch.float32 for parameter in mindskips(model)[0].router.parameters())
    model.train()(tokens(), LENGTHS).square().mean().backward()
    for name, parameter in model.named_parameters():         # also those of which no token is closed
        assert (parameter.grad is not None) == (name in names), name
    narrow = add_routers(Llama.from_pretrained(tiny, dtype=torch.bfloat16), "block_token", gate="flexidepth")
    with torch.no_grad():
        assert narrow(tokens()).dtype == torch.bfloat16
        for skip in mindskips(narrow).values():
            skip.override = close_all
        assert narrow(tokens()).dtype == torch.bfloat16


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_gates_of_a_training_pass_are_kept(granularity, tiny):
    model = add_routers(Llama.from_pretrained(tiny), granularity)
    for skip in mindskips(model).values():
        skip.router.weight.data.normal_(0, 0.3)
    model.train()(tokens(), LENGTHS, PROMPTS)
    for skip in mindskips(model).values():
        assert not skip.merges and skip.gates.requires_grad
        assert skip.gates.shape == ((8,) if granularity.endswith("sequence") else (8, 40))
        assert torch.equal(skip.gates.sum(), skip.opened) and 0 < float(skip.opened.detach()) <= skip.seen
    model.eval()(tokens(), LENGTHS, PROMPTS)
    assert all(skip.gates is None for skip in mindskips(model).values())     # a copy has no graph to carry


@pytest.mark.parametrize("gate", ["bottleneck", *KINDS])
def test_the_router_file(gate, tiny, tmp_path):
    path = tmp_path / "r.safetensors"
    model = routed(tiny, gate).float()
    for skip in mindskips(model).values():
        skip.router.float()
    save_routers(model, path)
    own = {"weight": (1, 48), "down.weight": (3, 48), "norm.weight": (3,), "up.weight": (48, 3)}
    if gate == "bottleneck":
        own |= {"bias": (1,)}
    if gate in ("adapter", "flexidepth"):
        own |= {"adapter_in.weight": (12, 48), "adapter_out.weight": (48, 6)}
    with safe_open(path, "pt") as file:
        assert file.metadata()["gate"] == gate
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}
    assert shapes == {f"layers.{i}.{name}": shape for i in (1, 2, 3) for name, shape in own.items()}
    again = Llama.from_pretrained(tiny)
    load_routers(again, path)
    with torch.no_grad():
        assert torch.equal(again(tokens()), model(tokens()))
    if gate in KINDS:
        with pytest.raises(InputError, match="load the model with model.py instead"):
            in_transformers.attach_routers(AutoModelForCausalLM.from_pretrained(tiny), path)


def test_only_gates_that_do_not_merge_are_captured(tiny, monkeypatch):
    monkeypatch.setattr(graph, "triton_module", lambda: SimpleNamespace())
    for gate, captured in ("linear", True), ("bottleneck", True), *((gate, False) for gate in KINDS):
        model = add_routers(Llama.from_pretrained(tiny), "block_token", gate=gate)
        assert all(bool(graph.can_capture(skip, None)) == captured for skip in graph.active_skips(model))


def test_a_captured_step_of_the_bottleneck(tiny, monkeypatch):
    """All but the capture itself, on a CPU."""
    model, idx = routed(tiny, "bottleneck"), tokens()
    expected = model.generate(idx, 9, lengths=LENGTHS)
    replay_eagerly(monkeypatch)
    assert torch.equal(model.generate(idx, 9, lengths=LENGTHS), expected)


def test_the_script_tunes_again_and_serves_the_other_scripts(arguments, call, tmp_path, monkeypatch):
    path = tmp_path / "out" / "routers.safetensors"
    flags = [*arguments, "--layers", "1-3", "--steps", 8, "--lr", 0.05]
    monkeypatch.setattr(sys, "orig_argv", ["python3", "examples/flexidepth.py", "--resume", "--out", "a b"])
    status, said = call(flexidepth.main, *flags, "--penalty", 0.2)
    assert status == 0 and "recipe flexidepth" in said
    with safe_open(path, "pt") as file:
        meta = file.metadata()
    assert meta["gate"] == "flexidepth" and meta["granularity"] == "block_token"
    assert meta["command"] == "python examples/flexidepth.py --out 'a b'"
    tensors, priced = load_file(path), json.loads(meta["held_out"])["capacity"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    assert {line["lambda"] for line in lines} == {0.2}
    assert lines[0]["capacity"] == pytest.approx((1 + 3 / 2) / 4)          # every g is 1/2
    status, said = call(flexidepth.main, *flags, "--penalty", 0.2)
    again = load_file(path)
    assert status == 0 and all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert call(flexidepth.main, *flags, "--penalty", 0, "--gate", "gated", "--loss", "kl")[0] == 0
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["held_out"])["capacity"] > priced
    data = tmp_path / "data.jsonl"
    shown = [*arguments[:2], "--routers", path, "--text", data, "--last", 4, "--dtype", "float32"]
    status, said = call(flexidepth.main, "eval", *shown, "--tasks", "rte", "--limit", 2, "--data-dir",
                        "data/questions")
    assert status == 0 and "routed" in said
    monkeypatch.delitem(flexidepth.GATES, "gated")
    status, said = call(evaluation.main, *shown)
    assert status == 1 and is_one_sentence(said) and "'gated'" in said


def test_its_gates_under_our_recipe(arguments, call, tmp_path):
    arguments += ["--granularity", "block_token"]
    for gate in "flexidepth", "adapter":
        status, said = call(flexidepth.main, "train_router", *arguments, "--gate", gate)
        assert status == 0 and "recipe default" in said
    model = Llama.from_pretrained(arguments[1])
    load_routers(model, tmp_path / "out" / "routers.safetensors", capacity=0.7)


@pytest.mark.parametrize("flags, named", [
    (["--granularity", "block_sequence"], "block_sequence"), (["--granularity", "attn_token"], "block_token"),
    (["--granularity", "mlp_token"], "block_token"), (["--layers", "2-9"], "layers 0 to 3"),
    (["--gate", "gated", "--granularity", "attn_sequence"], "attn_sequence"),
    (["--gate", "adapter"], "--gate adapter"), (["--gate", "linear"], "--gate linear"),
    (["--kv", "open"], "--kv open"), (["--method", "ramp"], "--method ramp"),
    (["--data", "none.jsonl"], "none.jsonl"), (["--gate", "last_token"], "last_token"),
])
def test_what_is_refused(flags, named, arguments, call):
    status, said = call(flexidepth.main, *arguments, "--layers", "1-3", *flags)
    said = "\n".join(line for line in said.splitlines() if "records read" not in line)
    assert status != 0 and is_one_sentence(said) and named in said
