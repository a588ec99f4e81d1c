"""kv="open": closed tokens take no part in attention, against brute force and against training's mask."""
import pytest
import torch
from conftest import bound, greedy_continuation, in_float64, write_tiny
from test_router import LENGTHS, PROMPTS, compare_modes, real, routed, tokens

import open_keys
from model import Llama
from router import add_routers, capacity, load_routers, mindskips, save_routers, trace
from weights import InputError

TOKEN = ["attn_token", "block_token"]
FAMILIES = ["grouped queries", "Mistral with a window", "Qwen3", "SmolLM3"]


@pytest.mark.parametrize("granularity", TOKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_tokens_are_a_shorter_sequence(granularity, family, tmp_path):
    """One layer by brute force, token by token in float64: an open token attends to itself and the open ones
    before it within the window, rotated by the positions that they have in the text."""
    write_tiny(tmp_path, family)
    model = routed(tmp_path, granularity, kv="open")
    x, window = torch.randn(3, 40, 48).double(), model.config.sliding_window or 10**6
    net, lengths = in_float64(model), torch.tensor([40, 25, 1])
    skip = mindskips(net)[1]
    ctx = net.context(tokens(3), lengths)
    with trace(net) as decisions, torch.no_grad():
        y = skip(x, ctx)
    is_open, attn = decisions[1][0], skip.attn
    for b, n in enumerate(lengths.tolist()):
        for t in range(n):
            expected = x[b, t]
            if is_open[b, t]:
                seen = [s for s in range(t + 1) if is_open[b, s] and t - s < window]
                row = x[b, seen][None]
                alone = net.context(torch.zeros(1, len(seen), dtype=torch.int64))
                alone.cos, alone.sin, alone.mask = ctx.cos[seen], ctx.sin[seen], None
                expected = attn(row, alone)[0, -1]
                if granularity == "block_token":
                    expected = skip.sublayer.mlp(expected)
            assert (y[b, t] - expected).abs().max() < 1e-10
        assert torch.equal(y[b, n:], x[b, n:]) and (n == 1 or 0 < is_open[b, :n].float().mean() < 1)


@pytest.mark.parametrize("granularity", TOKEN)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", [0.0, 100.0, -100.0])
def test_skipping_equals_masking(granularity, family, bias, tmp_path):
    write_tiny(tmp_path, family)
    model = routed(tmp_path, granularity, bias=bias, kv="open")
    for rows in range(8), [0]:
        for net in model, in_float64(model):
            difference, skipped, there, here = compare_modes(net, rows)
            assert difference < max(bound(skipped, 96), 1e-9)
            assert there == pytest.approx(here)
        if bias == 100.0:
            idx, n, p = tokens()[rows], LENGTHS[rows], PROMPTS[rows]
            is_real = torch.arange(idx.shape[1]) < n[:, None]
            dense = Llama.from_pretrained(tmp_path)(idx, n)
            assert (dense - model(idx, n, p))[is_real].abs().max() < bound(dense, 96)


def test_no_score_is_so_high_that_a_closed_key_is_seen(tiny):
    model = in_float64(routed(tiny, "attn_token", kv="open"))
    for skip in mindskips(model).values():
        skip.attn.qkv.weight.data[:skip.attn.n_head * skip.attn.head_dim] *= 100          # queries
    difference, skipped, *_ = compare_modes(model, range(8))
    assert difference < 1e-9 * max(1, float(skipped.abs().max()))


@pytest.mark.parametrize("granularity", TOKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_equals_recomputing(granularity, family, tmp_path, monkeypatch):
    """Prompts of several lengths in one batch; a cache that grows by one, or by more than is needed."""
    write_tiny(tmp_path, family)
    model = routed(tmp_path, granularity, kv="open")
    idx, outputs = tokens(), []
    for growth in 1, 64:
        monkeypatch.setattr(open_keys, "GROWTH", growth)
        outputs.append(model.generate(idx, 16, lengths=LENGTHS))
    assert torch.equal(*outputs)
    used, opened = capacity(model), 0.0
    for b, n in enumerate(LENGTHS.tolist()):
        row = greedy_continuation(model, idx[b, :n], 16)
        with torch.no_grad():
            model(row[None, :-1])
        assert torch.equal(outputs[0][b, :n + 16], row)
        opened += capacity(model) * (n + 15)
        assert torch.equal(model.generate(idx[b:b + 1, :n], 16)[0], row)
    assert used == pytest.approx(opened / (int(LENGTHS.sum()) + 8 * 15), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_without_open_tokens(dtype, tiny):
    """Its layers store nothing; then a step opens some of them, each for itself."""
    model = add_routers(Llama.from_pretrained(tiny, dtype=dtype), "attn_token", kv="open")
    opened = []
    for i, skip in mindskips(model).items():
        skip.override = lambda score, ctx, i=i: torch.full_like(score, ctx.decoding and len(opened) % 4 == i)
    out = model.generate(tokens(3), 9, on_token=opened.append)
    assert capacity(model) == pytest.approx(8 * 3 / (4 * 3 * 48)) and torch.equal(out[:, :40], tokens(3))


def test_the_cache_holds_open_tokens_only(tiny, monkeypatch):
    monkeypatch.setattr(open_keys, "GROWTH", 1)
    model, idx = routed(tiny, "attn_token", layers="1-3", kv="open"), tokens(B=1)
    with trace(model) as decisions:
        model.generate(idx, 20)
    per_token = 2 * 2 * 8 * 4                                            # keys, values; 2 heads of 8, float32
    expected = per_token * (40 + 20)                                     # layer 0 has no gate
    for passes in decisions.values():
        n_open = int(torch.cat([is_open[0] for is_open in passes]).sum())
        prompt = int(passes[0].sum())
        expected += per_token * max(prompt + 1, n_open)                  # one at least for new ones
    assert model.cache.bytes() == expected


@pytest.mark.parametrize("granularity", TOKEN)
def test_a_closed_token_multiplies_by_no_weight(granularity, tiny):
    model, idx, rows = routed(tiny, granularity, layers="2", kv="open"), tokens(), []
    skip = mindskips(model)[2]
    for layer in skip.attn.qkv, skip.attn.o:
        layer.register_forward_hook(lambda layer, args, y: rows.append(args[0].shape[-2]))
    with torch.no_grad():
        model(idx[:1])
        assert rows == [int(skip.opened)] * 2 and 0 < rows[0] < 40
        rows.clear()
        skip.router.bias.data.fill_(-100.0)
        model(idx)
        assert not any(rows)


def test_gradients_reach_the_gates_through_the_keys(tiny):
    """With ramps: dL/dw by autograd against differences of the loss, all but the routers in float64."""
    model = in_float64(routed(tiny, "attn_token", kv="open")).train()
    up = torch.randn(2, 40, 320).double()
    for skip in mindskips(model).values():
        skip.estimator = lambda score, threshold: torch.sigmoid(4 * (score - threshold))
    weight = mindskips(model)[0].router.weight
    (model(tokens(2)) * up).sum().backward()
    direction, step = torch.randn_like(weight), 1e-2
    losses = []
    for sign in 1, -1:
        with torch.no_grad():
            weight.add_(sign * step * direction)
            losses.append(float((model(tokens(2)) * up).sum()))
            weight.sub_(sign * step * direction)
    slope = float((weight.grad * direction).sum())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_files_keep_it_and_other_granularities_refuse_it(tiny, tmp_path):
    model = routed(tiny, "attn_token", bias=0.2, kv="open")
    save_routers(model, tmp_path / "r.safetensors")
    again = Llama.from_pretrained(tiny)
    assert load_routers(again, tmp_path / "r.safetensors")["kv"] == "open"
    with torch.no_grad():
        assert torch.equal(real(again(tokens(), LENGTHS)), real(model(tokens(), LENGTHS)))
    for granularity in "attn_sequence", "mlp_token", "block_sequence":
        with pytest.raises(InputError, match="kv 'open': only for"):
            add_routers(model, granularity, kv="open")
    with pytest.raises(InputError, match="'some'"):
        add_routers(model, "attn_token", kv="some")


@pytest.mark.parametrize("granularity", TOKEN)
@pytest.mark.parametrize("family", FAMILIES)
def test_lengths_that_recur_as_on_a_gpu(granularity, family, tmp_path, monkeypatch):
    """Gathered columns are rounded up; what is too many is hidden, from gradients too."""
    write_tiny(tmp_path, family)
    model, idx = routed(tmp_path, granularity, kv="open"), tokens()
    with torch.no_grad():
        expected, out = real(model(idx, LENGTHS)), model.generate(idx, 6, lengths=LENGTHS)
        monkeypatch.setattr(open_keys, "is_asynchronous", lambda x: True)
        monkeypatch.setattr(open_keys, "CUDA_MULTIPLE", 16)
        assert (real(model(idx, LENGTHS)) - expected).abs().max() < 1e-4
        assert torch.equal(model.generate(idx, 6, lengths=LENGTHS), out)


@pytest.mark.usefixtures("native_bfloat16")
def test_a_token_that_sees_no_key_has_no_gradient(tmp_path):
    """Of those that fill up gathered columns, some are beyond the window of all that are open."""
    write_tiny(tmp_path, "Mistral with a window")
    model = routed(tmp_path, "attn_token", kv="open").bfloat16()
    x, skip = torch.randn(8, 40, 48, dtype=torch.bfloat16, requires_grad=True), mindskips(model)[1]
    skip.override = lambda score, ctx: (torch.arange(40) < 2).float().expand(8, -1)
    skip(x, model.context(tokens(), LENGTHS)).sum().backward()
    assert x.grad.isfinite().all()
