"""The gate, the routed sublayer and what skipping saves, against float64 references and brute force."""
import copy
import gc
import math
import pickle
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from conftest import bound, greedy_continuation, in_float64, is_one_sentence, write_tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import router
import skipping
from model import Llama, run_layers
from router import (
    GRANULARITIES,
    MindSkip,
    add_routers,
    capacity,
    dense,
    load_routers,
    mindskips,
    open_shares,
    overall_capacity,
    parse_layers,
    routed_share,
    save_routers,
    straight_through,
    trace,
)
from support import attention as attentions
from weights import InputError

SEQUENCE = [g for g in GRANULARITIES if g.endswith("sequence")]
LENGTHS = torch.tensor([40, 7, 23, 1, 39, 12, 40, 30])
PROMPTS = torch.tensor([12, 7, 3, 1, 20, 6, 40, 9])


def routed(folder, granularity, layers="all", bias=0.0, seed=0, **options):
    """A tiny model with random gates, about half of them open (bias 0)."""
    model = add_routers(Llama.from_pretrained(folder), granularity, layers, **options)
    generator = torch.Generator().manual_seed(seed)
    for gate in mindskips(model).values():
        gate.router.weight.data.normal_(0, 0.3, generator=generator)
        gate.router.bias.data.fill_(bias)
    return model


def tokens(B=8, T=40, seed=1):
    return torch.randint(0, 320, (B, T), generator=torch.Generator().manual_seed(seed))


def real(x):
    """Without padding: the real positions of a batch of LENGTHS."""
    return x[torch.arange(x.shape[1]) < LENGTHS[:, None]]


def test_straight_through_is_the_step_forward_and_the_score_backward():
    score = torch.tensor([0.1, 0.4999, 0.5, 0.9], requires_grad=True)
    gate = straight_through(score, 0.5)
    assert gate.tolist() == [0, 0, 1, 1]
    (gate * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert score.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gate_and_its_gradients_against_float64(granularity, tiny):
    """y = x + g f(norm(x)); dL/dw = sum over gates of (dL/dy . f) s (1 - s) pool(norm(x)); in float64."""
    model = routed(tiny, granularity, layers="2").train()
    gate = mindskips(model)[2]
    idx, part = tokens(), gate.part
    ctx = model.context(idx, LENGTHS, PROMPTS)
    x = run_layers(model.layers[:2], model.embed(idx), ctx).detach()
    before = model.layers[2].attn(x, ctx).detach() if part == "mlp" else x
    up = torch.randn(before.shape)
    y = gate(before, ctx)
    (y * up).sum().backward()

    norm = gate.sublayer.attn.norm if part == "block" else gate.sublayer.norm
    b64 = before.double()
    h = b64 / (b64.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight.double()
    if granularity.endswith("sequence"):
        h = torch.stack([h[b, :p].mean(0) for b, p in enumerate(PROMPTS)])
    s = 1 / (1 + torch.exp(-(h @ gate.router.weight[0].double() + gate.router.bias.double())))
    f = (gate.sublayer(before, ctx) - before).double()
    g = (s >= 0.5).double()
    wide = g[:, None, None] if g.dim() == 1 else g[..., None]
    assert 0 < g.mean() < 1
    assert (y - (b64 + wide * f)).abs().max() < bound(y, 48)
    dg = (up * f).sum((1, 2) if g.dim() == 1 else 2)
    ds = dg * s * (1 - s)
    dw = (ds[..., None] * h).sum(tuple(range(h.dim() - 1)))
    assert (gate.router.weight.grad[0] - dw).abs().max() < 1e-4 * dw.abs().max()
    assert (gate.router.bias.grad - ds.sum()).abs().max() < 1e-4 * ds.abs().sum()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_reach_every_router_and_nothing_else(granularity, tiny):
    model = routed(tiny, granularity).train()
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert names == {n for n, _ in model.named_parameters() if ".router." in n} and len(names) == 8
    (model(tokens(), LENGTHS, PROMPTS).square().mean() + sum(open_shares(model))).backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (name in names), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_open_gates_are_the_dense_model_exactly(granularity, training, tiny):
    idx, plain = tokens(), Llama.from_pretrained(tiny)
    model = add_routers(Llama.from_pretrained(tiny), granularity).train(training)  # new gates are open
    with torch.set_grad_enabled(training):
        assert torch.equal(real(model(idx, LENGTHS)), real(plain(idx, LENGTHS)))
    assert capacity(model) == 1
    model = routed(tiny, granularity)
    with torch.no_grad(), dense(model):
        with dense(model):
            pass
        assert torch.equal(model(idx), plain(idx))
    assert not any(skip.bypass for skip in mindskips(model).values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_closed_gates_leave_the_residual_stream_bit_for_bit(granularity, training, tiny):
    model = routed(tiny, granularity, bias=-100.0).train(training)
    x, ctx = torch.randn(8, 40, 48), model.context(tokens(), LENGTHS, PROMPTS)
    with torch.set_grad_enabled(training):
        assert torch.equal(mindskips(model)[1](x, ctx), x)
        model(tokens(), LENGTHS, PROMPTS)
    assert capacity(model) == 0


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_padding_and_neighbours_change_no_row(granularity, tiny):
    model, idx = routed(tiny, granularity), tokens()
    with torch.no_grad():
        for net in model, in_float64(model):
            together = net(idx, LENGTHS, PROMPTS)
            for b, (n, p) in enumerate(zip(LENGTHS, PROMPTS)):
                alone = net(idx[b:b + 1, :n], prompt_lengths=p[None])[0]
                assert (together[b, :n] - alone).abs().max() < bound(together, 96)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_mode_alone_says_whether_to_mask_or_to_skip(granularity, tiny):
    """train() computes everything, eval() does not compute what is closed, whatever autograd is set to."""
    model, idx = routed(tiny, granularity, bias=-100.0), tokens()
    counts = {}
    for training in True, False:
        for grad in True, False:
            with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
                model.train(training)(idx, LENGTHS, PROMPTS)
            counts[training, grad] = counter.get_total_flops()
    with torch.no_grad(), dense(model), FlopCounterMode(display=False) as counter:
        model.eval()(idx, LENGTHS, PROMPTS)
    routers_too = 4 * 2 * 48 * (8 if granularity.endswith("sequence") else 8 * 40)
    assert counts[True, True] == counts[True, False] == counter.get_total_flops() + routers_too
    assert counts[False, True] == counts[False, False] < counter.get_total_flops()
    for skip in mindskips(model).values():
        skip.estimator = None                             # the gate of training, and of nothing else
    model(idx, LENGTHS, PROMPTS)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_override_forces_decisions(granularity, tiny):
    model = routed(tiny, granularity)
    for skip in mindskips(model).values():
        skip.override = router.close_all
    with torch.no_grad():
        model(tokens(), LENGTHS, PROMPTS)
        assert capacity(model) == 0
        for skip in mindskips(model).values():
            skip.override = lambda score, ctx: torch.ones_like(score)
        model(tokens(), LENGTHS, PROMPTS)
    assert capacity(model) == 1


def compare_modes(net, rows):
    """(the largest difference of the two modes' logits at real positions of some rows, eval's logits, and the
    capacities of train and eval)."""
    idx, n, p = tokens()[rows], LENGTHS[rows], PROMPTS[rows]
    masked, there = net.train()(idx, n, p), capacity(net)
    with torch.no_grad():
        skipped, here = net.eval()(idx, n, p), capacity(net)
    is_real = torch.arange(idx.shape[1]) < n[:, None]
    return (masked - skipped)[is_real].abs().max(), skipped, there, here


@pytest.mark.parametrize("gates", ["half", "open", "closed"])
@pytest.mark.parametrize("family", ["grouped queries", "Mistral with a window", "SmolLM3"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_skipping_equals_computing_and_masking(granularity, family, gates, tmp_path):
    write_tiny(tmp_path, family)
    model = routed(tmp_path, granularity, bias={"half": 0.0, "open": 100.0, "closed": -100.0}[gates])
    for rows in range(8), [0]:
        for net in model, in_float64(model):
            difference, skipped, there, here = compare_modes(net, rows)
            assert difference < bound(skipped, 96)
        assert there == pytest.approx(here) and (len(rows) == 1 or 0 < here < 1 or gates != "half")


@pytest.mark.parametrize("family", ["grouped queries", "Mistral with a window", "SmolLM3"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_generate_equals_recomputing_with_the_prompts_decision(granularity, family, tmp_path):
    write_tiny(tmp_path, family)
    model, idx = routed(tmp_path, granularity), tokens()
    out = model.generate(idx, max_new_tokens=16, lengths=LENGTHS)
    used = capacity(model)
    opened = 0
    for b, n in enumerate(LENGTHS.tolist()):
        row = greedy_continuation(model, idx[b, :n], 16, prompt_lengths=LENGTHS[b:b + 1])
        with torch.no_grad():
            model(row[None, :-1], prompt_lengths=LENGTHS[b:b + 1])
        assert torch.equal(out[b, : n + 16], row)
        opened += capacity(model) * (1 if granularity.endswith("sequence") else n + 15)
        assert torch.equal(model.generate(idx[b:b + 1, :n], max_new_tokens=16)[0], row)
    total = 8 if granularity.endswith("sequence") else int(LENGTHS.sum()) + 8 * 15
    assert used == pytest.approx(opened / total, abs=1e-6)


def test_pending_steps_while_a_window_fills(tmp_path, monkeypatch):
    """Rows of equal length share their angles until the window is full; from then on each has its own."""
    write_tiny(tmp_path, "Mistral with a window")
    monkeypatch.setattr(attentions, "OPEN_ROWS_FROM", 1)
    model, idx = routed(tmp_path, "attn_token"), tokens(B=2, T=6)
    is_open = torch.tensor([1.0] * 6 + [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1])        # of each position
    assert 6 < model.config.sliding_window < 6 + 7                               # steps wait on both sides
    for skip in mindskips(model).values():
        skip.override = lambda score, ctx: is_open[ctx.end - 1 if ctx.decoding else 0].expand_as(score)
    out, columns = model.generate(idx, 12), idx
    for skip in mindskips(model).values():
        skip.override = lambda score, ctx: is_open[:score.shape[1]].expand_as(score)
    with torch.no_grad():
        for _ in range(12):
            columns = torch.cat((columns, model(columns)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, columns)


@pytest.mark.parametrize("granularity", ["attn_sequence", "block_sequence"])
def test_cache_holds_what_runs_and_no_more(granularity, tiny):
    model = routed(tiny, granularity)
    model.generate(tokens(), max_new_tokens=4, lengths=LENGTHS)
    used, size = capacity(model), model.cache.bytes()
    with dense(model):
        model.generate(tokens(), max_new_tokens=4, lengths=LENGTHS)
    assert 0 < used < 1 and size == used * model.cache.bytes()


def flops(model, idx):
    """Operations of matrix products in a forward pass: (in attention, in linear layers)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(idx)
    counts = counter.get_flop_counts()["Global"]
    in_attention = sum(n for op, n in counts.items() if "bmm" in str(op))
    return in_attention, sum(counts.values()) - in_attention


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_matrix_products_fall_by_exactly_what_is_skipped(granularity, tiny, monkeypatch):
    monkeypatch.setattr(attentions, "CALL", 1)      # a query then attends to the keys up to its own, no other
    model, idx = routed(tiny, granularity), tokens(B=4)
    with dense(model):
        attention, linear = flops(model, idx)
    B, T, C, kv, D, up, V, L = 4, 40, 48, 2 * 8, 8, 96, 320, 4
    q_o, k_v, mlp, head = 2 * 2 * C * C, 2 * 2 * C * kv, 3 * 2 * C * up, 2 * C * V  # a token
    assert linear == B * T * (L * (q_o + k_v + mlp) + head)
    assert attention == 2 * 2 * L * B * 6 * T * T * D
    with trace(model) as decisions:
        attention_left, linear_left = flops(model, idx)
    positions = []                                                       # of the open tokens, in every layer
    for (is_open,) in decisions.values():
        positions += is_open.nonzero()[:, -1].tolist()
    closed = round((1 - capacity(model)) * L * B * T)  # tokens times layers not run
    saved = {"attn_sequence": q_o + k_v, "attn_token": q_o, "mlp_sequence": mlp, "mlp_token": mlp,
             "block_sequence": q_o + k_v + mlp, "block_token": q_o + mlp}[granularity]
    cost_of_routers = 2 * C * L * B * (1 if granularity.endswith("sequence") else T)
    assert 0 < closed < L * B * T
    assert linear_left == linear - closed * saved + cost_of_routers
    if granularity.startswith("mlp"):
        assert attention_left == attention
    elif granularity.endswith("sequence"):
        assert attention_left == pytest.approx(attention * capacity(model), rel=1e-9)
    else:
        assert attention_left == sum(2 * 2 * 6 * D * (t + 1) for t in positions)


@pytest.mark.parametrize("granularity", ["attn_token", "block_token"])
def test_keys_and_values_of_closed_steps_are_pending(granularity, tiny, monkeypatch):
    """A closed step multiplies by no weight of its sublayer; what waited is computed with the next open step
    or after PENDING steps, and changes no token."""
    model, idx = routed(tiny, granularity, layers="1-3"), tokens()
    whole, products, decisions = model.generate(idx, 20, lengths=LENGTHS), [], []
    monkeypatch.setattr(attentions, "OPEN_ROWS_FROM", 1)
    assert torch.equal(model.generate(idx, 20, lengths=LENGTHS), whole)
    row = model.generate(idx[:1], 20)
    for pending in 3, 1:                                                    # 1: none
        monkeypatch.setattr(skipping, "PENDING", pending)
        assert torch.equal(model.generate(idx, 20, lengths=LENGTHS), whole)
        assert torch.equal(model.generate(idx[:1], 20), row)
    monkeypatch.setattr(skipping, "PENDING", 5)
    skip = mindskips(model)[2]
    skip.override = lambda score, ctx: torch.full_like(score, decisions[-1] if ctx.decoding else 1.0)
    skip.attn.qkv.register_forward_hook(lambda layer, args, y: products.append(y.shape[-2]))
    model.generate(idx[:1], 14, on_token=lambda _: decisions.append(len(decisions) in (2, 4, 11)))
    # steps 0 1 wait, 2 opens, 3 waits, 4 opens, 5 to 9 are computed when there are five, 10 waits, 11 opens
    assert products == [idx.shape[1], 3, 2, 5, 2]


@pytest.mark.parametrize("B", [1, 8])
@pytest.mark.parametrize("granularity, kv", [("attn_sequence", "all"), ("attn_token", "all"),
                                             ("attn_token", "open"), ("block_token", "open")])
def test_the_memory_of_a_generation_is_freed_with_its_cache(granularity, kv, B, tiny):
    """Without the garbage collector, which may come late, and does not know how large a GPU's tensors are."""
    model = routed(tiny, granularity, kv=kv)
    gc.disable()
    try:
        model.generate(tokens(B), 5)
        memory = [weakref.ref(keys) for keys in model.cache.k if keys is not None]
        model.cache = None
        assert memory and all(keys() is None for keys in memory)
    finally:
        gc.enable()


class Calls(TorchDispatchMode):
    """Counts PyTorch's operations, but for views."""
    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.n += not call.is_view
        return call(*args, **kwargs or {})


@pytest.mark.parametrize("granularity, kv", [
    ("attn_token", "all"), ("mlp_token", "all"), ("block_token", "all"), ("attn_token", "open"),
    ("block_token", "open")])
def test_a_step_of_one_row_decides_as_any_step_with_few_operations(granularity, kv, tiny, monkeypatch):
    model, idx = routed(tiny, granularity, bias=0.1, kv=kv), tokens(B=1)

    def run():
        with trace(model) as decisions:
            out = model.generate(idx, 20)
        steps = torch.tensor([[bool(step) for step in steps[1:]] for steps in decisions.values()])
        assert 0 < steps.float().mean() < 1
        return out, steps, capacity(model)
    single = run()
    with monkeypatch.context() as patched:
        patched.setattr(MindSkip, "is_single", lambda skip, x: False)
        for mine, plain in zip(single, run()):
            assert torch.equal(torch.as_tensor(mine), torch.as_tensor(plain))
    skip = mindskips(model)[1]
    skip.threshold = 2.0
    model.generate(idx, 2)
    x, ctx = torch.randn(1, 1, 48), model.step_context(model.cache, [41])
    with torch.no_grad(), Calls() as calls:
        assert skip(x, ctx) is x
    assert calls.n <= 4                              # two products, read by the host
    assert skip.is_single(x) and not skip.train().is_single(x)


@pytest.mark.parametrize("bias, gathered_from", [(0.0, 0), (100.0, 0), (0.0, 2**37)])
def test_the_order_of_a_prefill_on_a_gpu(bias, gathered_from, tiny, monkeypatch):
    """Keys are computed while the host waits for the decisions; with few tokens it does not wait."""
    model, idx, order = routed(tiny, "block_token", layers="1", bias=bias), tokens(), []

    def noted(name, function):
        def call(*args):
            order.append(name)
            return function(*args)
        return call
    with torch.no_grad():
        expected, share = real(model(idx, LENGTHS)), capacity(model)
        monkeypatch.setattr(skipping, "GATHERED_FROM", gathered_from)
        monkeypatch.setattr(skipping, "is_asynchronous", lambda x: True)
        monkeypatch.setattr(skipping, "keys_values", noted("keys", skipping.keys_values))
        monkeypatch.setattr(skipping, "to_host", lambda t: noted("wait", lambda: t))
        assert (real(model(idx, LENGTHS)) - expected).abs().max() < 1e-4
    assert capacity(model) == pytest.approx(share)
    assert order == (["keys", "wait"] if gathered_from == 0 else [])


@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_a_prompt_whose_tokens_are_nearly_all_open_is_computed_whole(granularity, tiny, monkeypatch):
    """Nothing is gathered, and the closed ones stay as they were."""
    def close_the_fourth(score, ctx):
        return torch.where(torch.arange(score.shape[1]) == 3, 0.0, torch.ones_like(score))
    model, idx = routed(tiny, granularity), tokens(3, 40)
    lengths = torch.tensor([40, 40, 21])
    for skip in mindskips(model).values():
        skip.override = close_the_fourth
    with torch.no_grad():
        expected = model.train()(idx, lengths)
        monkeypatch.delattr(skipping, "run_gathered")
        found = model.eval()(idx, lengths)
    assert (found - expected)[:2].abs().max() < 1e-4
    assert (found - expected)[2, :21].abs().max() < 1e-4
    assert capacity(model, routed=True) == pytest.approx(98 / 101)


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["attn_token", "mlp_token", "block_token"])
def test_how_many_closed_tokens_make_gathering_pay(granularity, dtype, tiny):
    """A tenth of a prompt; for attention in bfloat16, on CPUs, 100 tokens and a twentieth."""
    model = routed(tiny, granularity)
    skip, x = mindskips(model)[1], torch.zeros(1, 512, 48, dtype=dtype)
    least = 126 if granularity == "attn_token" and dtype == torch.bfloat16 else 52
    few = [skipping.few_are_closed(skip, n_closed, 512, x) for n_closed in (0, least - 1, least, 512)]
    assert few == [True, True, False, False]


def test_only_open_tokens_reach_attention(tiny, monkeypatch):
    model, idx, seen = routed(tiny, "attn_token", layers="1"), tokens(), []

    def spy(q, *rest):
        seen.append(q.shape[2])
        return attentions.attention_of_some(q, *rest)

    monkeypatch.setattr(skipping, "attention_of_some", spy)
    with torch.no_grad():
        model(idx, LENGTHS)
    assert sum(seen) == int(mindskips(model)[1].opened) and 0 < sum(seen) < int(LENGTHS.sum())


class Products(TorchDispatchMode):
    """The shapes of all products."""
    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        if call.overloadpacket.__name__ in ("mm", "bmm", "addmm", "linear", "_linear_pointwise"):
            self.shapes.add(tuple(tuple(t.shape) for t in args if torch.is_tensor(t)))
        return call(*args, **kwargs or {})


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("granularity, kv", [
    ("attn_token", "all"), ("mlp_token", "all"), ("block_token", "all"), ("attn_token", "open")])
def test_gathered_tokens_have_shapes_that_recur(granularity, kv, tiny, monkeypatch):
    """In bfloat16, where oneDNN plans each new shape: 70 and 90 open tokens of 128 are computed as 96, and so
    are 35 and 45 of each of two rows, whose attention is of 64."""
    model, shapes = routed(tiny, granularity, layers="1", kv=kv).bfloat16(), []
    monkeypatch.setattr(skipping, "few_are_closed", lambda *given: False)
    skip = mindskips(model)[1]
    for n_open, B in (70, 1), (90, 1), (35, 2), (45, 2):
        is_open = torch.arange(128) < n_open - 1
        is_open[-1] = True
        skip.override = lambda score, ctx, is_open=is_open: is_open.float().expand(len(score), -1)
        with torch.no_grad(), Products() as products:
            model(tokens(B, 128))
        assert skip.opened == n_open * B
        shapes.append(products.shapes)
    assert shapes[0] == shapes[1] and shapes[2] == shapes[3]


def test_chunks_of_queries_change_nothing(tiny, monkeypatch):
    model = routed(tiny, "attn_token")
    both = model, in_float64(model)
    with torch.no_grad():
        whole = [net(tokens(), LENGTHS) for net in both]
        monkeypatch.setattr(attentions, "CALL", 3)
        for net, expected in zip(both, whole):
            assert (real(net(tokens(), LENGTHS)) - real(expected)).abs().max() < bound(expected, 96)


def test_the_gate_reads_the_prompt_only(tiny):
    idx, other = tokens(), tokens()
    other[:, 12:] = tokens(seed=9)[:, 12:]
    for pool, same in ("prompt", True), ("all", False):
        model = routed(tiny, "attn_sequence", layers="0", pool=pool)
        gate, scores = mindskips(model)[0], []
        for ids in idx, other:
            ctx = model.context(ids, None, torch.full((8,), 12))
            scores.append(gate.score(gate.norm(model.embed(ids)), ctx))
        assert torch.equal(*scores) == same
        h = gate.sublayer.norm(model.embed(other))[:, : 12 if same else None]
        exact = torch.sigmoid(gate.router(h.mean(1)).squeeze(1))
        assert (scores[1] - exact).abs().max() < bound(exact, 48)


def test_plain_text_has_a_prompt_of_64_tokens(tiny):
    model, idx = routed(tiny, "attn_sequence"), tokens(T=100)
    with torch.no_grad():
        assert torch.equal(model(idx), model(idx, prompt_lengths=torch.full((8,), 64)))
        short = idx[:, :30]
        assert torch.equal(model(short), model(short, prompt_lengths=torch.full((8,), 30)))


def test_capacity_counts_layers_without_a_router_as_open(tiny):
    model = routed(tiny, "attn_token", layers="1,3", bias=-100.0)
    with pytest.raises(RuntimeError, match="run the model first"):
        capacity(model)
    with torch.no_grad():
        model(tokens())
    assert capacity(model) == 0.5 and capacity(model, routed=True) == 0
    assert float(overall_capacity(open_shares(model), 4)) == 0.5 and routed_share(0.5, 2, 4) == 0


def test_routers_stay_float32_in_a_bfloat16_model(tiny):
    model = add_routers(Llama.from_pretrained(tiny, dtype=torch.bfloat16), "attn_token")
    gate = mindskips(model)[0]
    assert gate.router.weight.dtype == torch.float32
    assert gate.score(torch.randn(1, 3, 48).bfloat16(), model.context(tokens(1, 3))).dtype == torch.float32


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_save_and_load(granularity, tiny, tmp_path):
    model = routed(tiny, granularity, layers="0,2-3", bias=0.2, threshold=0.45, pool="all")
    save_routers(model, tmp_path / "r.safetensors", command="made by a test")
    with safe_open(tmp_path / "r.safetensors", "pt") as file:
        assert set(file.keys()) == {f"layers.{i}.{n}" for i in (0, 2, 3) for n in ("weight", "bias")}
        assert file.get_tensor("layers.2.weight").shape == (1, 48)
        assert file.get_tensor("layers.2.bias").shape == (1,)
        keys = {"granularity", "layers", "threshold", "pool", "model", "calibration"}
        assert keys <= file.metadata().keys()
    again = add_routers(Llama.from_pretrained(tiny), "mlp_token")  # what it had before is replaced
    assert load_routers(again, tmp_path / "r.safetensors")["command"] == "made by a test"
    train = {name for name, p in again.named_parameters() if p.requires_grad}
    assert train == {name for name, _ in again.named_parameters() if ".router." in name}
    with torch.no_grad():
        assert torch.equal(real(model(tokens(), LENGTHS)), real(again(tokens(), LENGTHS)))


class Shifted(router.LinearRouter):
    """A kind of gate of its own: with a parameter that the others do not have."""

    def __init__(self, n_embd, scope, pool="prompt"):
        super().__init__(n_embd, scope, pool)
        self.shift = torch.nn.Parameter(torch.zeros(n_embd))

    def pooled(self, h, ctx):
        return super().pooled(h, ctx) + self.shift


def test_a_hook_on_a_router_is_heard_in_prompts_and_steps(tiny):
    model = routed(tiny, "attn_token")
    for skip in mindskips(model).values():
        skip.router.register_forward_hook(lambda module, read, logit: torch.full_like(logit, -9.0))
    model.generate(tokens()[:1], 6)
    assert capacity(model, routed=True) == 0
    heard = []
    model = routed(tiny, "attn_token")
    mindskips(model)[0].router.register_forward_pre_hook(lambda module, read: heard.append(read))
    model.generate(tokens()[:1], 6)
    assert len(heard) == 6


def test_a_kind_of_gate_is_one_entry_and_its_name_is_in_the_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    monkeypatch.setitem(router.GATES, "shifted", Shifted)
    model = routed(tiny, "attn_token", gate="shifted")
    for skip in mindskips(model).values():
        skip.router.shift.data.normal_(0, 0.2)
    save_routers(model, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["gate"] == "shifted" and file.metadata()["kv"] == "all"
        assert tuple(file.get_tensor("layers.2.shift").shape) == (48,)
    again = Llama.from_pretrained(tiny)
    load_routers(again, path)
    with torch.no_grad():
        assert torch.equal(real(model(tokens(), LENGTHS)), real(again(tokens(), LENGTHS)))
    monkeypatch.delitem(router.GATES, "shifted")
    with pytest.raises(InputError, match=f"{path}: gate 'shifted' is not one of linear, unbiased"):
        load_routers(again, path)
    with pytest.raises(InputError, match="gate 'shifted'"):
        add_routers(again, gate="shifted")


def test_a_score_that_is_the_threshold_is_open_everywhere(tiny):
    """0.7 is less in float32 than in Python: a step of one row, decided by the host, does as a prompt."""
    model = add_routers(Llama.from_pretrained(tiny), threshold=0.7)
    for skip in mindskips(model).values():
        skip.override = lambda score, ctx: torch.full_like(score, 0.7)
    saturated = add_routers(Llama.from_pretrained(tiny), threshold=1.0)      # to float32 sigmoid(20) is 1
    for skip in mindskips(saturated).values():
        skip.router.bias.data.fill_(20)
    for routed, rows in product((model, saturated), (1, 2)):
        routed.generate(tokens()[:rows], 4)
        assert capacity(routed) == 1


def test_a_gate_that_merges_is_for_tokens_and_replaces_nothing(tiny, monkeypatch):
    model = Llama.from_pretrained(tiny)
    monkeypatch.setitem(router.GATES, "merging", type("Merging", (router.LinearRouter,), {"merge": None}))
    add_routers(model, gate="merging")
    with pytest.raises(InputError, match="gate 'merging', attn_sequence: merge is for tokens' gates"):
        add_routers(model, "attn_sequence", gate="merging")
    monkeypatch.setattr(router.GATES["merging"], "replacement", None, raising=False)
    with pytest.raises(InputError, match="without replacement"):
        add_routers(model, gate="merging")


class Noisy(router.LinearRouter):
    """A gate with noise in training, a state, and a weight that all layers share."""
    trunk = torch.nn.Linear(48, 48)

    def __init__(self, n_embd, scope, pool="prompt"):
        super().__init__(n_embd, scope, pool)
        self.trunk = Noisy.trunk
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, read):
        self.calls += 1
        self.kept = torch.nn.functional.dropout(self.trunk(read), 0.5, self.training).detach()
        return super().forward(self.kept)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_a_gate_with_noise_and_state(granularity, tiny, tmp_path, monkeypatch):
    """It is asked once in a training pass, with gradients of the noise that was drawn; a file keeps all."""
    monkeypatch.setitem(router.GATES, "noisy", Noisy)
    model = routed(tiny, granularity, gate="noisy").train()
    skip = mindskips(model)[2]
    model(tokens(), LENGTHS)
    read = skip.router.kept                                              # (B, T, C), or (B, C)
    skip.gates.sum().backward()
    assert int(skip.router.calls) == 1
    score = torch.sigmoid(read @ skip.router.weight[0] + skip.router.bias).detach()
    terms = (score * (1 - score))[..., None] * read                      # the score's gradient
    terms = real(terms) if granularity == "attn_token" else terms
    torch.testing.assert_close(skip.router.weight.grad[0], terms.sum(0))
    save_routers(model, tmp_path / "r.safetensors")
    again = Llama.from_pretrained(tiny)
    load_routers(again, tmp_path / "r.safetensors")
    assert int(mindskips(again)[2].router.calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_routed_model_in_another_dtype(granularity, dtype, tiny):
    """Its routers stay in float32, so that it decides as the model of that dtype with routers added to it."""
    model, twin = routed(tiny, granularity).to(dtype), Llama.from_pretrained(tiny, dtype=dtype)
    add_routers(twin, granularity)
    for skip, other in zip(mindskips(model).values(), mindskips(twin).values()):
        other.router.load_state_dict(skip.router.state_dict())
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        assert torch.equal(real(model(tokens(), LENGTHS)), real(twin(tokens(), LENGTHS)))
    written = [m.generate(tokens(), 4, lengths=LENGTHS) for m in (model, twin)]
    assert torch.equal(*written)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_files_of_before_gate_and_kv_were_stored_load_as_they_did(granularity, tiny, tmp_path):
    model = routed(tiny, granularity, bias=0.2)
    save_routers(model, tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        meta = {key: value for key, value in file.metadata().items() if key not in ("gate", "kv")}
        save_file({key: file.get_tensor(key) for key in file.keys()}, tmp_path / "old.safetensors", meta)
    again = Llama.from_pretrained(tiny)
    load_routers(again, tmp_path / "old.safetensors")
    with torch.no_grad():
        assert torch.equal(real(model(tokens(), LENGTHS)), real(again(tokens(), LENGTHS)))
    meta["kv"] = "some"
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        save_file({key: file.get_tensor(key) for key in file.keys()}, tmp_path / "old.safetensors", meta)
    with pytest.raises(InputError, match="kv 'some'"):
        load_routers(again, tmp_path / "old.safetensors")


def test_the_threshold_is_a_dial(tiny, tmp_path):
    path, model = tmp_path / "r.safetensors", routed(tiny, "attn_token")
    save_routers(model, path, [(0.5, 0.6), (0.1, 0.9), (0.9, 0.3)])
    for asked, threshold in (0.6, 0.5), (0.75, 0.3), (0.3, 0.9), (0.9, 0.1), (0.45, 0.7), (None, 0.5):
        load_routers(model, path, asked)
        assert [gate.threshold for gate in mindskips(model).values()] == pytest.approx([threshold] * 4)
    with pytest.raises(InputError, match="0.300 to 0.900, not 0.95"):
        load_routers(model, path, 0.95)
    save_routers(model, path, [(0.2, 0.9537), (0.9, 0.2218)])
    for as_printed, threshold in (0.954, 0.2), (0.222, 0.9), (0.2217, 0.9):
        load_routers(model, path, as_printed)
        assert mindskips(model)[0].threshold == pytest.approx(threshold, abs=1e-3)
    save_routers(model, path, [(0.2, 1.0), (0.6, 1.0), (0.7, 0.8), (0.8, 0.0), (0.9, 0.0)])
    for asked, threshold in (0.9, 0.65), (0.4, 0.75), (0.99, 0.605), (0.01, 0.79875), (1.0, 0.2), (0.0, 0.8):
        load_routers(model, path, asked)          # between the near ends of what is equal
        assert [gate.threshold for gate in mindskips(model).values()] == pytest.approx([threshold] * 4)
    save_routers(model, path)
    with pytest.raises(InputError, match="has no calibration"):
        load_routers(model, path, 0.5)


def test_thresholds_of_a_router_file(tiny, tmp_path):
    """Of whatever type of number, and one for all layers."""
    path = tmp_path / "r.safetensors"
    for threshold in np.float64(0.5), np.float32(0.75), torch.tensor(0.625):
        save_routers(routed(tiny, "attn_token", threshold=threshold), path)
        assert float(load_routers(Llama.from_pretrained(tiny), path)["threshold"]) == float(threshold)
    model = routed(tiny, "attn_token")
    mindskips(model)[1].threshold = 0.6
    with pytest.raises(InputError, match="one threshold"):
        save_routers(model, path)


def test_router_file_of_another_model(tiny, tmp_path):
    save_routers(routed(tiny, "attn_token"), tmp_path / "r.safetensors")
    write_tiny(tmp_path / "other", "head_dim")
    other = Llama.from_pretrained(tmp_path / "other")
    object.__setattr__(other.config, "n_layer", 5)
    with pytest.raises(InputError, match="another shape"):
        load_routers(other, tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="not a router file"):
        load_routers(other, tiny / "model.safetensors")
    (tmp_path / "r.safetensors").write_bytes(b"junk")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_routers(other, tmp_path / "r.safetensors")
    with pytest.raises(InputError, match="missing; train_router.py"):
        load_routers(other, tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=f"^{tmp_path}: is a folder"):
        load_routers(other, tmp_path)


def test_parse_layers():
    assert parse_layers("all", 4) == [0, 1, 2, 3]
    assert parse_layers("last:2", 4) == [2, 3]
    assert parse_layers("1-2", 4) == [1, 2]
    assert parse_layers("3,0", 4) == [0, 3]
    assert parse_layers("0,2-3", 4) == [0, 2, 3]
    for wrong in "4", "2-9", "last:5", "x", "", "3-1", "-1", "last:0", "last:x", "1,,2":
        with pytest.raises(InputError, match="layers"):
            parse_layers(wrong, 4)


def test_add_routers_refuses(tiny):
    model = Llama.from_pretrained(tiny)
    with pytest.raises(InputError, match="is not one of attn_sequence"):
        add_routers(model, "head_token")
    with pytest.raises(InputError, match="pool"):
        add_routers(model, "attn_token", pool="max")
    with pytest.raises(InputError, match="layers 0 to 3"):
        add_routers(model, "attn_token", "2-9")
    for threshold in -0.1, 1.5, math.nan:
        with pytest.raises(InputError, match="threshold"):
            add_routers(model, "attn_token", threshold=threshold)
    with pytest.raises(InputError, match="no routers"):
        save_routers(model, "unused")
    assert not any(isinstance(m, MindSkip) for m in model.modules())


@pytest.mark.parametrize("threshold", [0.0, 0.01, 0.5, 0.8, 0.99, 1.0])
def test_new_linear_gates_are_open_at_any_threshold(threshold, tiny):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", threshold=threshold)
    model(tokens())
    assert capacity(model) == 1
    expected = 1 + max(0.0, math.log(threshold / max(1 - threshold, 1e-16)) if threshold else 0.0)
    for skip in mindskips(model).values():
        assert float(skip.router.bias.detach()) == pytest.approx(expected)


@pytest.mark.parametrize("granularity, kv", [("attn_token", "all"), ("block_sequence", "all"),
                                             ("attn_token", "open")])
def test_a_routed_model_can_be_copied_at_any_time(granularity, kv, tiny):
    model, idx = routed(tiny, granularity, kv=kv), tokens()
    model.train()(idx).sum().backward()
    model.eval().generate(idx[:1], 3)                    # of one row, which keeps what its gates read
    model.train()(idx)                                   # with the graph of a training pass
    expected = model.eval()(idx)
    model.train()(idx)
    for copied in copy.deepcopy(model), pickle.loads(pickle.dumps(model)):
        assert capacity(copied) == capacity(model)
        assert torch.equal(copied.eval()(idx), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("granularity, kv", [
    *((granularity, "all") for granularity in GRANULARITIES),
    ("attn_token", "open"), ("block_token", "open")])
def test_cuda_gives_the_logits_and_tokens_of_the_cpu(granularity, kv, tmp_path, monkeypatch):
    write_tiny(tmp_path, "head_dim")                       # 16, which the Triton kernels of attention take
    on_cpu, idx = routed(tmp_path, granularity, kv=kv), tokens()
    on_gpu = routed(tmp_path, granularity, kv=kv).cuda()
    for gathered_from in 2**37, 0:
        monkeypatch.setattr(skipping, "GATHERED_FROM", gathered_from)
        with torch.no_grad():
            expected = real(on_cpu(idx, LENGTHS, PROMPTS))
            found = real(on_gpu(idx.cuda(), LENGTHS.cuda(), PROMPTS.cuda()).cpu())
        assert (found - expected).abs().max() < 1e-3
        assert capacity(on_cpu) == pytest.approx(capacity(on_gpu))
    for threshold, rows in (0.5, 8), (0.5, 8), (0.4, 8), (0.5, 1), (0.5, 8):         # captured, then replayed
        for model in on_cpu, on_gpu:
            for skip in mindskips(model).values():
                skip.threshold = threshold
        idx, n = tokens()[:rows], LENGTHS[:rows]
        out = on_cpu.generate(idx, max_new_tokens=8, lengths=n)
        assert torch.equal(on_gpu.generate(idx.cuda(), max_new_tokens=8, lengths=n.cuda()).cpu(), out)
        assert capacity(on_cpu) == pytest.approx(capacity(on_gpu))


@pytest.mark.parametrize("key, value, named", [
    ("threshold", "nan", "its threshold"), ("threshold", "x", "its threshold"),
    ("threshold", "1.5", "its threshold"),
    ("threshold", "-0.1", "its threshold"), ("threshold", "inf", "its threshold"),
    ("layers", "0-99999999", "layers"),
    ("layers", "", "layers"), ("granularity", "attn", "granularity"), ("pool", "mean", "pool"),
    ("kv", "none", "kv"),
    ("gate", "none", "gate"), ("model", "{", "its model"), ("model", "[" * 10**5, "its model"),
    ("model", "[]", "its model"),
    ("calibration", "x", "its calibration"), ("calibration", "{}", "its calibration"),
    ("calibration", "[[0.5]]", "its calibration"), ("calibration", "[[NaN, 0.7]]", "its calibration"),
    ("calibration", '[["0.5", 0.7]]', "its calibration"), ("calibration", "[[0.5, 7]]", "its calibration"),
    ("calibration", "[0.5, 0.7]", "its calibration"),
])
def test_metadata_is_checked(key, value, named, tiny, router_file):
    path = router_file("attn_token")
    save_file(load_file(path), path, metadata=safe_open(str(path), "pt").metadata() | {key: value})
    with pytest.raises(InputError, match=named) as refusal:
        load_routers(Llama.from_pretrained(tiny), path)
    assert is_one_sentence(str(refusal.value)) and str(path) in str(refusal.value)


@pytest.mark.parametrize("tensor", [
    None, torch.zeros(1, 47), torch.zeros(48), torch.zeros(0), torch.zeros(1, 48).bool(),
    torch.zeros(1, 48).long(), torch.full((1, 48), float("nan")), torch.full((1, 48), float("inf"))])
def test_tensors_are_checked(tensor, tiny, router_file):
    path = router_file("attn_token")
    tensors = load_file(path) | {"layers.2.weight": tensor}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path, metadata=safe_open(str(path), "pt").metadata())
    model = routed(tiny, "attn_token")
    with pytest.raises(InputError, match="layers.2.weight") as refusal:
        load_routers(model, path)
    assert not mindskips(model)                          # rather none than half of the file's
    assert is_one_sentence(str(refusal.value)) and str(path) in str(refusal.value)
