"""The kernels against PyTorch's own and against float64."""
import copy
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import bound
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from model import Llama, RMSNorm
from support import attention as attentions
from support.attention import additive_mask, attention, attention_of_some, fill
from support.cuda import only_for
from support.kernels import (
    MKL,
    NATIVE_BFLOAT16,
    ONEDNN,
    Linear,
    logit_of_token,
    packed_weights,
    root_mean_square,
)

PACKS = NATIVE_BFLOAT16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("kind", ["causal", "mask", "queries of their own", "mask of the last keys"])
@pytest.mark.parametrize("T", [2, 128, 300])
def test_bfloat16_attention_in_chunks_against_float64(kind, T):
    """Outputs and gradients, as near to float64 as PyTorch's own kernel on the same bfloat16 numbers."""
    S = T + 40 if kind == "queries of their own" else T
    q, up = torch.randn(2, 2, 9, T, 64).bfloat16()
    k, v = torch.randn(2, 2, 3, S, 64).bfloat16()
    whole = mask = None if kind == "causal" else torch.rand(2, 1, T, S) < 0.6
    if kind == "mask of the last keys":
        mask = whole[0, 0, :, S // 2:]
        mask[-1] = True
        whole = torch.cat((torch.ones(T, S // 2, dtype=torch.bool), mask), 1)
    elif mask is not None:
        mask[..., 0] = True

    def run(f, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        y = f(*leaves)
        y.backward(up.to(dtype))
        return [y.detach().double(), *(leaf.grad.double() for leaf in leaves)]

    def fused(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=whole, is_causal=whole is None, enable_gqa=True)

    def ours(q, k, v):
        return attention(q, k, v, None if mask is None else additive_mask(mask, q.dtype), causal=mask is None)

    exact, theirs, mine = run(fused, torch.float64), run(fused, torch.bfloat16), run(ours, torch.bfloat16)
    assert (run(ours, torch.float64)[0] - exact[0]).abs().max() < 1e-12
    for right, a, b in zip(exact, theirs, mine):
        assert (b - right).square().mean() < 6 * (a - right).square().mean() + 1e-9
        assert (b - right).norm() < 0.01 * right.norm()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n_in, n_out", [(96, 50), (95, 50), (96, 11000)])                # 11,000: not small
def test_few_tokens_in_float32_have_the_product_and_its_operations(n_in, n_out, bias):
    """One token by a small weight has twice the operations: halves of rows by both halves of the token."""
    layer = Linear(n_in, n_out, bias)
    weight, offset = layer.weight.double(), layer.bias.double() if bias else 0
    for shape in (1,), (1, 1), (2, 1), (1, 3), (5,), (6, 1), (4, 7):
        x = torch.randn(*shape, n_in)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = layer(x)
            part = layer(x, start=9, end=41)
        exact = x.double() @ weight.T + offset
        assert y.is_contiguous() and (y - exact).abs().max() < bound(y, n_in)
        assert part.is_contiguous() and (part - exact[..., 9:41]).abs().max() < bound(y, n_in)
        halves = MKL and x.numel() == n_in == 96
        once = 2 if halves and n_out == 50 else 1
        assert counter.get_total_flops() == 2 * x.numel() * (once * n_out + (1 + halves) * 32)


@pytest.mark.parametrize("trains", [[], ["bias"], ["weight", "bias"]])
@pytest.mark.parametrize("n_out, T, suits_onednn", [(50, 1, True), (50, 7, False), (500, 7, True)])
def test_products_in_float32_have_their_gradients(n_out, T, suits_onednn, trains):
    """Against float64; oneDNN's products, which know no autograd, are those of weights that do not train."""
    layer = Linear(96, n_out).requires_grad_(False)
    for name in trains:
        getattr(layer, name).requires_grad_(True)
    x, up = torch.randn(4, T, 96, requires_grad=True), torch.randn(4, T, n_out)
    y = layer(x)
    assert ("FrozenLinear" in y.grad_fn.name()) == (suits_onednn and ONEDNN and not trains)
    y.backward(up)
    weight = layer.weight.double()
    assert (y - x.double() @ weight.T - layer.bias.double()).abs().max() < bound(y, 96)
    assert (x.grad - up.double() @ weight).abs().max() < bound(x.grad, n_out)
    if "bias" in trains:
        exact = up.double().sum((0, 1))
        assert (layer.bias.grad - exact).abs().max() < bound(layer.bias.grad, 4 * T)
    if "weight" in trains:
        exact = up.double().flatten(0, 1).T @ x.double().flatten(0, 1)
        assert (layer.weight.grad - exact).abs().max() < bound(layer.weight.grad, 4 * T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("has_bias", [True, False])
def test_norm_and_logit_of_one_token_against_float64(has_bias, dtype):
    norm = RMSNorm(96, 1e-2).to(dtype)
    norm.weight.data.normal_()
    x, weight, bias = torch.randn(1, 1, 96).to(dtype), torch.randn(1, 96), torch.randn(1) * has_bias
    with torch.no_grad():
        exact = x.double() / (x.double().square().mean() + 1e-2).sqrt() * norm.weight.double()
        y = norm(x)
        token = x.flatten().float()
        rms = root_mean_square(token, norm.eps)
        logit = logit_of_token(norm, weight, bias if has_bias else None)(token, rms)
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=4 * torch.finfo(dtype).eps)
    expected = weight.double() @ exact.flatten() + bias
    assert logit == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.skipif(not PACKS, reason="oneDNN computes no bfloat16 here")
def test_packed_weights_have_the_product_and_last_as_long_as_a_generation(tiny, monkeypatch):
    model, idx = Llama.from_pretrained(tiny, dtype=torch.bfloat16), torch.arange(12).view(3, 4)
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    with torch.no_grad(), packed_weights(model, 3):
        assert all(layer.packed == {} for layer in layers)
        for layer in layers:
            for shape in (3, layer.in_features), (3, 1, layer.in_features):
                x = torch.randn(shape).bfloat16()
                with FlopCounterMode(display=False) as counter:
                    y = layer(x)
                exact = x.double() @ layer.weight.double().T
                assert torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-4)
                assert counter.get_total_flops() == 2 * x.numel() * layer.out_features
                assert torch.equal(layer(x, 8, 40), y[..., 8:40])
                assert set(layer.packed) == {(0, None), (8, 40)}
    before = model.generate(idx, 8)
    assert all(layer.packed is None for layer in layers)
    copied = copy.deepcopy(model)
    for layer in layers:
        layer.weight.data.neg_()                     # which no counter of versions would tell
    changed = model.generate(idx, 8)
    assert not torch.equal(changed, before) and torch.equal(copied.generate(idx, 8), before)
    with packed_weights(model, 3):                           # a generation that another one interrupts
        copied.generate(idx, 2)
        model.generate(idx, 2)
        assert all(layer.packed is not None and layer.rows == 3 for layer in layers)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    with packed_weights(model, 3):                           # too large for a machine of 10,000 bytes
        assert all(layer.packed is None for layer in layers)


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("masks", [0, 1, 3])
@pytest.mark.parametrize("S", [1000, 300])                             # by products, and by PyTorch's kernel
def test_bfloat16_attention_of_a_step_against_float64(masks, S, monkeypatch):
    B, by_products = 3, []
    monkeypatch.setattr(torch, "bmm", lambda *args, bmm=torch.bmm: by_products.append(args) or bmm(*args))
    q, memory = torch.randn(B, 6, 1, 16).bfloat16(), torch.randn(2, B, 2, S + 40, 16).bfloat16()
    memory[:, :, :, S:] = torch.nan                                    # the cache after the step
    k, v = memory[:, :, :, :S]
    visible = torch.rand(masks, 1, 1, S) < 0.5
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), visible if masks else None,
                                           enable_gqa=True)
    y = attention(q, k, v, additive_mask(visible, q.dtype) if masks else None)
    assert y.dtype == q.dtype and (y - exact).abs().max() < 0.01 and len(by_products) == 2 * (S == 1000)
    assert all(keys.shape[1] == 1024 and weights.shape[2] == 1024          # a multiple of 32: shapes recur
               for (keys, _), (weights, _) in zip(by_products[::2], by_products[1::2]))


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("n_open", [1, 2, 3, 4])
def test_bfloat16_attention_of_a_step_is_of_open_rows_where_at_most_half_are(n_open):
    q, (k, v) = torch.randn(4, 6, 1, 16).bfloat16(), torch.randn(2, 4, 2, 600, 16).bfloat16()
    is_open = torch.arange(4) < n_open
    whole = attention(q, k, v)
    with only_for(is_open, {}):
        y = attention(q, k, v)
    assert (y - whole)[is_open].abs().max() < 0.01 and bool(y[~is_open].any()) == (n_open == 3)


@pytest.mark.parametrize("T", [1, 50])
def test_without_bfloat16_instructions_attention_is_not_by_products(T, monkeypatch):
    """Which take 6 to 20 times as long there."""
    monkeypatch.setattr(attentions, "NATIVE_BFLOAT16", False)
    monkeypatch.setattr(torch, "bmm", None)
    q, (k, v) = torch.randn(1, 6, T, 16).bfloat16(), torch.randn(2, 1, 2, 2000, 16).bfloat16()
    at = torch.arange(0, T, 3)
    mask = additive_mask(torch.ones(T, 2000, dtype=torch.bool).tril(2000 - T), q.dtype)[None, None]
    exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v, mask)), enable_gqa=True)
    assert (attention(q, k, v, mask) - exact).abs().max() < 0.01
    found = attention_of_some(q[:, :, at], k, v, [len(at)], at, at, T)
    assert (found - exact[:, :, at]).abs().max() < 0.01
    assert fill(at, [len(at)], q) == (at, [len(at)])


@pytest.mark.parametrize("masks", [0, 1, 6])
def test_attention_of_a_step_reads_no_key_of_a_closed_row(masks, monkeypatch):
    """In float64; a closed row's keys are not numbers. Neighbouring rows are one call."""
    is_open = torch.tensor([True, False, False, True, True, False])
    monkeypatch.setattr(attentions, "OPEN_ROWS_FROM", 40)
    q, k, v = (torch.randn(6, n, S, 16, dtype=torch.float64) for n, S in ((6, 1), (2, 40), (2, 40)))
    visible = torch.rand(max(masks, 1), 1, 1, 40) < (0.7 if masks else 2)
    mask = additive_mask(visible, q.dtype) if masks else None
    score = (q @ k.repeat_interleave(3, 1).mT / 4).masked_fill(~visible, -torch.inf)
    whole = score.softmax(-1) @ v.repeat_interleave(3, 1)
    assert (attention(q, k, v, mask) - whole).abs().max() < 1e-12
    kernel, sizes = attentions.pytorch_attention, []
    monkeypatch.setattr(attentions, "pytorch_attention",
                        lambda q, *rest: sizes.append(len(q)) or kernel(q, *rest))
    k[~is_open], v[~is_open] = torch.nan, torch.nan
    with only_for(is_open, {}):
        y = attention(q, k, v, mask)
    assert (y - whole)[is_open].abs().max() < 1e-12 and not y[~is_open].any() and sizes == [1, 2]


@pytest.mark.parametrize("T, S", [(300, 300), (50, 90), (1, 40)])
@pytest.mark.parametrize("masks, by_parts", [(0, False), (0, True), (1, True), (4, True)])
def test_attention_of_some_queries_against_all_of_them(masks, by_parts, T, S, monkeypatch):
    """Chosen queries of ragged rows have the outputs that they have among all queries, in float64. By parts
    there is no mask."""
    B, H, K, D = 4, 6, 2, 16
    monkeypatch.setattr(attentions, "parts_are_faster", lambda q, S: by_parts)
    q = torch.randn(B, H, T, D, dtype=torch.float64)
    k, v = torch.randn(2, B, K, S, D, dtype=torch.float64)
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T).expand(B, 1, T, S)
    mask = None
    if masks:                                                # one for all rows, or one per row
        visible = visible[:masks] & (torch.rand(masks, 1, T, S) < 0.7)
        visible[..., 0] = True
        mask = additive_mask(visible, q.dtype)
    score = q @ k.repeat_interleave(H // K, 1).mT / D**0.5
    whole = score.masked_fill(~visible, -torch.inf).softmax(-1) @ v.repeat_interleave(H // K, 1)
    columns = [torch.arange(0, T, 2), torch.arange(0), torch.tensor([T - 1]), torch.arange(T)]
    at = torch.cat([b * T + c for b, c in enumerate(columns)])
    chosen = torch.cat([q[b, :, c] for b, c in enumerate(columns)], 1)[None]               # (1, H, N, D)
    expected = torch.cat([whole[b, :, c] for b, c in enumerate(columns)], 1)[None]
    found = attention_of_some(chosen, k, v, [len(c) for c in columns], at, at, T, mask)
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("counts", [[70], [96], [35, 0], [3, 45, 0, 20], [64, 33]])
def test_gathered_tokens_are_filled_up_with_the_last_one(counts):
    """In bfloat16, and attend as before, against float64."""
    T, B = 80, len(counts)
    at = torch.cat([row * T + torch.randperm(T)[:n].sort().values for row, n in enumerate(counts)])
    q, k, v = torch.randn(6, B * T, 16).bfloat16(), *torch.randn(2, B, 2, T, 16).bfloat16()
    filled, new_counts = fill(at, counts, q)
    n, row = len(at), int(at[-1]) // T
    assert len(filled) % 32 == 0 and len(filled) < n + 32 and torch.equal(filled[:n], at)
    assert set(filled[n:].tolist()) <= {int(at[-1])}
    assert new_counts == [c + (len(filled) - n) * (b == row) for b, c in enumerate(counts)]
    y = attention_of_some(q[None, :, filled], k, v, new_counts, filled, filled, T)[0, :, :n].double()
    for i, (b, t) in enumerate(zip((at // T).tolist(), (at % T).tolist())):
        keys, values = (s[b, :, :t + 1].double().repeat_interleave(3, 0) for s in (k, v))
        weights = (keys @ q[:, at[i], :, None].double() / 4).softmax(1)
        assert (y[:, i] - (weights.mT @ values)[:, 0]).abs().max() < 0.03
    assert fill(at, counts, q.float()) == (at, counts)


@pytest.mark.usefixtures("native_bfloat16")
@pytest.mark.parametrize("n, S, grad, expected", [(1024, 2048, False, 1), (1024, 2048, True, 0),
                                                  (1023, 2048, False, 0), (1500, 2047, False, 0)])
def test_most_of_many_tokens_attend_in_two_parts(n, S, grad, expected, monkeypatch):
    """In float32, against float64; in bfloat16 products are faster."""
    kernel, calls = attentions.attention_by_parts, []
    monkeypatch.setattr(attentions, "attention_by_parts", lambda *given: calls.append(1) or kernel(*given))
    q, k, v = torch.randn(1, 2, n, 16), torch.randn(1, 1, S, 16), torch.randn(1, 1, S, 16)
    at = torch.randperm(S)[:n].sort().values
    with torch.set_grad_enabled(grad):
        found = attention_of_some(q, k, v, [n], at, at, S)
        attention_of_some(q.bfloat16(), k.bfloat16(), v.bfloat16(), [n], at, at, S)
    visible = torch.arange(S) <= at[:, None]
    score = (q.double() @ k.double().mT / 4).masked_fill(~visible, -torch.inf)
    assert (found - score.softmax(-1) @ v.double()).abs().max() < 1e-5 and len(calls) == expected


@pytest.mark.parametrize("dtype, masked, T, heads, groups", [
    (torch.bfloat16, False, 40, 2, True),          # flash, which reads each key head once
    (torch.bfloat16, True, 40, 6, False),          # memory-efficient: heads repeated, no scores written out
    (torch.float32, False, 40, 6, False),
    (torch.float32, True, 40, 6, False),
    (torch.bfloat16, True, 4096, 6, False),        # cuDNN, but where the mask learns
    (torch.bfloat16, False, 1, 2, False),          # one token: its query heads are rows of their key head
    (torch.float32, True, 1, 2, False),
])
def test_which_attention_kernel_cuda_takes(dtype, masked, T, heads, groups, monkeypatch):
    """On tensors without memory. Where heads are grouped and there is a mask, or float32, PyTorch would take
    the kernel that materializes all scores."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, mask, **options):
        calls.append((q, k, v, options))
        mask_learns = mask is not None and mask.requires_grad          # of which cuDNN has no gradient
        assert torch.backends.cuda.cudnn_sdp_enabled() == (q.shape[2] >= 4096 and not mask_learns)
        return q if q.requires_grad else real(q, k, v, mask, **options)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with FakeTensorMode():
        q = torch.empty(3, 6, T, 16, device="cuda", dtype=dtype)
        k = torch.empty(3, 2, 40, 16, device="cuda", dtype=dtype)
        mask = torch.empty(1, 1, T, 40, device="cuda", dtype=dtype) if masked else None
        assert attention(q, k, k, mask, causal=not masked and T > 1).shape == q.shape
        if masked and T > 1:                         # log g in the mask, of weights that do not train
            attention(q, k, k, mask.requires_grad_())
            assert calls.pop()[0].requires_grad
    assert torch.backends.cuda.cudnn_sdp_enabled()   # as it was
    (q, k, v, options), = calls
    assert k.shape[1] == v.shape[1] == heads and q.shape[1] == (2 if T == 1 else 6)
    assert options.get("enable_gqa", False) == groups
