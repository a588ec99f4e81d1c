"""The kernels for CUDA, by Triton's interpreter where there is no GPU, against PyTorch in float64."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FAMILIES, write_tiny
from test_graph import replay_eagerly
from test_router import routed, tokens

import skipping
from model import Llama, rotate, swiglu
from router import capacity
from skipping import rotate_some
from support import cuda
from support.attention import additive_mask, attention, kernels_fit, store

triton_kernels = pytest.importorskip("support.triton_kernels", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16     # the interpreter multiplies no bfloat16


IDX = tokens(3, 16).to(DEVICE)
LENGTHS, PROMPTS = torch.tensor([16, 5, 1], device=DEVICE), torch.tensor([4, 5, 1], device=DEVICE)


def real(x, lengths):
    """Without padding."""
    return x[torch.arange(x.shape[1], device=x.device) < lengths[:, None]]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(found, expected, dtype=torch.float32):
    error = (found.double() - expected).norm() / expected.norm()
    assert found.shape == expected.shape and found.dtype == dtype
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_in, n_out", [(48, 70), (1200, 9)])
def test_linear_reads_no_weight_where_the_gate_is_closed(n_in, n_out, bias, dtype):
    x, weight = random(1, 1, n_in, dtype=dtype), random(n_out + 3, n_in, dtype=dtype)[3:]
    bias = random(n_out, dtype=dtype) if bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    is_open = torch.ones(1, dtype=torch.bool, device=DEVICE)
    check(triton_kernels.linear(x, weight, bias), expected, dtype)
    check(triton_kernels.linear(x, weight, bias, is_open), expected, dtype)
    plus = random(1, 1, n_out, dtype=dtype)
    check(triton_kernels.linear(x, weight, bias, is_open, plus), expected + plus.double(), dtype)
    nothing, n_gated = torch.zeros_like(weight[:, 0]) if bias is None else bias, n_out - 6
    weight[:n_gated].fill_(torch.nan)                          # would be seen, were it read
    kept = triton_kernels.linear(x, weight, bias, ~is_open, None, n_gated)[..., n_gated:]
    check(kept, expected[..., n_gated:], dtype)
    weight.fill_(torch.nan)
    assert torch.equal(triton_kernels.linear(x, weight, bias, ~is_open)[0, 0], nothing)
    check(triton_kernels.linear(x, weight, bias, ~is_open, plus), (nothing + plus).double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("B, H, K, S, masks", [(1, 8, 2, 300, 0), (3, 6, 6, 70, 1), (3, 6, 2, 130, 3)])
def test_attention_of_token(B, H, K, S, masks, dtype):
    q = random(B, 1, H, 32, dtype=dtype).transpose(1, 2)
    k, v = (random(B, S + 2, K, 32, dtype=dtype).transpose(1, 2)[:, :, :S] for _ in range(2))
    mask = None
    if masks:
        visible = torch.rand(masks, 1, 1, S, device=DEVICE) < 0.5
        visible[..., 64:128] = False                           # a block that no query sees
        visible[..., 0] = True
        mask = additive_mask(visible, dtype)
    repeated = (t.double().repeat_interleave(H // K, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q.double(), *repeated, None if mask is None else mask.double())
    check(triton_kernels.attention_of_token(q, k, v, mask), expected, dtype)
    is_open = torch.arange(B, device=DEVICE) % 2 == 0
    k[~is_open], v[~is_open] = torch.nan, torch.nan
    found = triton_kernels.attention_of_token(q, k, v, mask, is_open)
    check(found, expected * is_open[:, None, None, None], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("B, T", [(3, 40), (1, 200)])
def test_attention_of_some(B, T, dtype):
    H, K, S = 6, 2, T + 30
    k, v = (random(B, S, K, 16, dtype=dtype).transpose(1, 2) for _ in range(2))
    is_open = torch.rand(B, T) < 0.6
    is_open[1:2] = False                                       # a row with no query
    at = is_open.flatten().nonzero().squeeze(1).to(DEVICE)
    q = random(len(at), H, 16, dtype=dtype).transpose(0, 1)[None]
    row, column = at // T, at % T + (S - T)
    score = torch.einsum("nhd,nhsd->nhs", q[0].transpose(0, 1).double(),
                         k.double().repeat_interleave(H // K, 1)[row]) / 4
    score = score.masked_fill(torch.arange(S, device=DEVICE) > column[:, None, None], -torch.inf).softmax(-1)
    values = v.double().repeat_interleave(H // K, 1)[row]
    expected = torch.einsum("nhs,nhsd->hnd", score, values)[None]
    counts = is_open.sum(1)
    firsts = F.pad(counts.cumsum(0), (1, 0)).int().to(DEVICE) if B > 1 else None
    check(triton_kernels.attention_of_some(q, k, v, at, firsts, T, int(counts.max())), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("D", [16, 24])
def test_what_stands_between_products(D, dtype):
    x = random(2, 5, 9, D, dtype=dtype).transpose(1, 2)[:, :7]                               # (B, H, T, D)
    for angles in (random(5, D, dtype=dtype), random(2, 1, 5, D, dtype=dtype)):
        expected = rotate.__wrapped__(x.double(), angles.double(), 2 * angles.double())
        check(triton_kernels.rotate(x, angles, 2 * angles), expected, dtype)
        at = torch.tensor([3, 9, 0], device=DEVICE)
        expected = rotate_some.__wrapped__(x[0, :, :3].double(), angles.double(), 2 * angles.double(), at)
        check(triton_kernels.rotate_some(x[0, :, :3], angles, 2 * angles, at), expected, dtype)
    gate, up = random(2, 5, 14 * D, dtype=dtype).chunk(2, -1)
    check(triton_kernels.swiglu(gate, up), swiglu.__wrapped__(gate.double(), up.double()), dtype)
    h, weight, bias = random(2, 5, 11 * D, dtype=dtype), random(1, 11 * D), random(1)
    norm = F.rms_norm(h.double(), weight[0].shape, weight[0].double(), 1e-5)
    check(triton_kernels.rms_norm(h, weight[0].to(dtype), 1e-5), norm, dtype)
    check(triton_kernels.logit(h, weight, bias), F.linear(h.double(), weight.double(), bias.double()))
    check(triton_kernels.logit(h, weight), F.linear(h.double(), weight.double()))
    n = torch.tensor([5, 2], device=DEVICE)
    check(triton_kernels.first_mean(h, n, 5), torch.stack([h[0].double().mean(0), h[1, :2].double().mean(0)]))
    for T in 1, 3:
        memory = [random(2, 4, 12, D, dtype=dtype) for _ in range(2)]
        new = [random(2, T, 9, D, dtype=dtype).transpose(1, 2)[:, :4] for _ in range(2)]
        expected = [t.clone() for t in memory]
        positions = torch.tensor([11, 4], device=DEVICE)
        store.__wrapped__(*expected, *new, positions)
        triton_kernels.store(*memory, *new, positions)
        assert all(map(torch.equal, memory, expected))


@pytest.fixture
def everywhere(monkeypatch):
    """The kernels serve on a CPU too, by the interpreter."""
    def module(x):
        return None if torch.is_grad_enabled() or not cuda.choices.triton else triton_kernels
    monkeypatch.setattr(cuda, "triton_kernels", module)


@pytest.mark.parametrize("family", ["Mistral with a window", "Qwen3"])
def test_a_model_that_runs_on_them(family, everywhere, tmp_path):
    write_tiny(tmp_path, family)
    model = Llama.from_pretrained(tmp_path, DEVICE)
    with torch.no_grad():
        with cuda.plain_kernels():
            expected, out = real(model(IDX, LENGTHS), LENGTHS), model.generate(IDX, 3, lengths=LENGTHS)
        assert (real(model(IDX, LENGTHS), LENGTHS) - expected).abs().max() < 1e-4
        assert torch.equal(model.generate(IDX, 3, lengths=LENGTHS), out)


@pytest.mark.parametrize("granularity, kv, rows", [
    ("attn_token", "all", 1), ("attn_token", "all", 3), ("attn_token", "open", 1), ("mlp_token", "all", 1),
    ("attn_sequence", "all", 1), ("attn_sequence", "all", 3), ("block_token", "all", 1),
    ("block_token", "open", 3), ("mlp_token", "all", 3)])
def test_captured_steps_that_run_on_them(granularity, kv, rows, everywhere, tmp_path, monkeypatch):
    """All but the capture itself: gates decide on the device, and what they close is not read."""
    monkeypatch.setitem(FAMILIES, "grouped queries", dict(head_dim=16, num_hidden_layers=2))
    monkeypatch.setattr(skipping, "GATHERED_FROM", 0)
    write_tiny(tmp_path)
    model, idx = routed(tmp_path, granularity, kv=kv).to(DEVICE), IDX[:rows]
    n, prompts = LENGTHS[:rows], PROMPTS[:rows]
    with torch.no_grad(), cuda.plain_kernels():
        expected = real(model(idx, n, prompts), n)
        out, share = model.generate(idx, 4, lengths=n), capacity(model)
    replay_eagerly(monkeypatch)
    with torch.no_grad():
        assert (real(model(idx, n, prompts), n) - expected).abs().max() < 1e-4
    for _ in range(2):
        assert torch.equal(model.generate(idx, 4, lengths=n), out)
        assert capacity(model) == pytest.approx(share)


@pytest.mark.parametrize("H, D", [(32, 16), (4, 24), (32, 64)])
def test_heads_that_the_kernels_do_not_take(H, D, everywhere):
    """More than 16 per key head, or of another width than a power of 2: PyTorch's attention."""
    q, k, v = random(2, H, 1, D), random(2, 1, 40, D), random(2, 1, 40, D)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    with torch.no_grad():
        check(attention(q, k, v), expected)


COMPILED = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from support import triton_kernels

number, D, card = sys.argv[1], *map(int, sys.argv[2:])
all_keys, queries, stages = triton_kernels.KEY_BLOCK, triton_kernels.QUERY_BLOCK, triton_kernels.STAGES
keys = all_keys // 2 if number == "fp32" else all_keys
TYPES = dict.fromkeys(("q", "k", "v", "y", "mask"), "*" + number) | {
    "is_open": "*i1", "parts": "*fp32", "weights": "*fp32", "scale": "fp32", "at": "*i64", "firsts": "*i32"}
for kernel, constants in (
        (triton_kernels.split_kernel, dict(K=2, G=4, D=D, HAS_MASK=True, GATED=True, KEYS=all_keys)),
        (triton_kernels.some_kernel, dict(G=4, D=D, ONE_ROW=False, QUERIES=queries, KEYS=keys))):
    names = kernel.arg_names
    types = {name: TYPES.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source, target = ASTSource(kernel, types, constexprs=values), GPUTarget("cuda", card, 32)
    print(compile(source, target=target, options={"num_stages": stages}).metadata.shared)
"""


@pytest.mark.parametrize("dtype, D, card, memory", [("fp32", 64, 75, 65536), ("bf16", 128, 86, 101376)])
def test_attentions_blocks_fit_the_shared_memory_of_small_cards(dtype, D, card, memory):
    """At the widest heads that kernels_fit lets through, on a T4 and a 3090; compiled, not run."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", COMPILED, dtype, str(D), str(card)], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert all(0 < int(line) <= memory for line in said.stdout.split())


@pytest.mark.parametrize("D, dtype, fits", [
    (64, torch.float32, True), (128, torch.float32, False), (128, HALF, True), (256, HALF, False),
    (8, HALF, False), (96, HALF, False)])
def test_heads_that_the_kernels_take(D, dtype, fits):
    q, k = random(1, 4, 1, D, dtype=dtype), random(1, 2, 9, D, dtype=dtype)
    assert kernels_fit(q, k) is fits
    assert not kernels_fit(q.repeat(1, 16, 1, 1), k)


def test_triton_that_does_not_work_is_done_without(monkeypatch, capsys):
    """As without a C compiler, in a container that has PyTorch alone."""
    def fail():
        raise RuntimeError("Failed to find C compiler. Please specify via CC\nor so")

    assert cuda.triton_module.__wrapped__() is triton_kernels
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=fail))
    monkeypatch.setattr(triton_kernels.triton.runtime, "driver", driver)
    assert cuda.triton_module.__wrapped__() is None
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Failed to find C compiler" in said
