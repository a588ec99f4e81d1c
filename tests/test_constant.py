"""examples/constant.py against its formula, computed by plain attention and loops."""
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import greedy_continuation
from test_graph import replay_eagerly
from test_router import LENGTHS, real, tokens

import skipping
from examples import constant
from model import Llama
from recipe import ramp
from router import (
    GRANULARITIES,
    KV_OPEN,
    add_routers,
    capacity,
    close_all,
    load_routers,
    mindskips,
    remove_routers,
    save_routers,
)
from support import graph
from support.data import DEFAULT_DATA, Sample, read_samples
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent


def routed(folder, **options):
    """A tiny model with random gates and constants, about half of the gates open."""
    model = add_routers(Llama.from_pretrained(folder), gate="constant", **options)
    generator = torch.Generator().manual_seed(0)
    for skip in mindskips(model).values():
        skip.router.weight.data.normal_(0, 0.3, generator=generator)
        skip.router.bias.data.zero_()
        skip.router.constant.data.normal_(0, 0.3, generator=generator)
    return model


def by_formula(model, idx, lengths, gate_of):
    """Logits of x + g f(h) + (1 - g) c in each attention, everything computed."""
    ctx = model.context(idx, lengths)
    x = model.embed(idx)
    for layer in model.layers:
        skip = layer.attn
        score = torch.sigmoid(skip.norm(x) @ skip.router.weight[0] + skip.router.bias)
        g = gate_of(score)[..., None]
        x = x + g * (skip.sublayer(x, ctx) - x) + (1 - g) * skip.router.constant
        x = layer.mlp(x)
    return model.head(model.norm(x))


@torch.no_grad()
def test_inference_is_the_formula_with_a_step(tiny):
    model, idx = routed(tiny), tokens()
    logits = model(idx, lengths=LENGTHS)
    assert 0.2 < capacity(model) < 0.8
    reference = by_formula(model, idx, LENGTHS, lambda score: (score >= 0.5).float())
    torch.testing.assert_close(real(logits), real(reference), atol=1e-4, rtol=1e-4)


def test_training_is_the_formula_with_a_ramp_and_constants_have_its_gradient(tiny):
    def ramp_at(score):
        return ramp(score, 0.5, 0.5)
    model, idx = routed(tiny), tokens()
    for skip in mindskips(model).values():
        skip.estimator = lambda score, threshold: ramp(score, threshold, 0.5)
    gradients = []
    for logits in model.train()(idx, lengths=LENGTHS), by_formula(model, idx, LENGTHS, ramp_at):
        trained = [skip.router.constant for skip in mindskips(model).values()]
        gradients.append(torch.autograd.grad(real(logits).log_softmax(-1)[:, 0].mean(), trained))
    for mine, reference in zip(*gradients):
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-3)


FORMS = [*((granularity, "all") for granularity in GRANULARITIES),
         *((granularity, "open") for granularity in KV_OPEN)]


def half_open(score, ctx):
    return score


def nearly_all_open(score, ctx):
    """But for the fourth token, or row."""
    return (torch.arange(score.shape[-1]) != 3).float().expand_as(score)


@torch.no_grad()
@pytest.mark.parametrize("scores", [half_open, nearly_all_open, close_all])
@pytest.mark.parametrize("granularity, kv", FORMS)
def test_skipping_equals_training(granularity, kv, scores, tiny):
    """What is gathered, or computed whole, is what is computed everywhere and multiplied."""
    model, idx = routed(tiny, granularity=granularity, kv=kv), tokens()
    for skip in mindskips(model).values():
        skip.override = scores
    masked = model.train()(idx, lengths=LENGTHS)
    skipped = model.eval()(idx, lengths=LENGTHS)
    torch.testing.assert_close(real(skipped), real(masked), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("granularity, kv", FORMS)
def test_bfloat16(granularity, kv, tiny):
    """Constants are float32, the residual stream is not: one row's steps, a batch's, training."""
    model, idx = routed(tiny, granularity=granularity, kv=kv).bfloat16(), tokens()
    assert mindskips(model)[1].router.constant.dtype == torch.float32
    assert model.train()(idx, lengths=LENGTHS).dtype == torch.bfloat16
    for rows in 1, 8:
        model.eval().generate(idx[:rows], 4)
        assert 0.1 < capacity(model) < 0.9


@pytest.mark.parametrize("granularity, kv", FORMS)
def test_prefill_and_decode_equal_recomputation(granularity, kv, tiny, monkeypatch):
    model, idx = routed(tiny, granularity=granularity, kv=kv), tokens()
    singles = []
    run_single = skipping.run_single
    monkeypatch.setattr(skipping, "run_single", lambda *args: singles.append(1) or run_single(*args))
    out = model.generate(idx, 8, lengths=LENGTHS)
    assert not singles
    for b, n in enumerate(LENGTHS.tolist()):
        row = greedy_continuation(model, idx[b, :n], 8, prompt_lengths=LENGTHS[b:b + 1])
        assert torch.equal(out[b, :n + 8], row)
        assert torch.equal(model.generate(idx[b:b + 1, :n], 8)[0], row)
    assert bool(singles) == granularity.endswith("token")       # one row takes the way of linear routers


@pytest.mark.parametrize("granularity, kv", FORMS)
def test_a_captured_step(granularity, kv, tiny, monkeypatch):
    """All but the capture itself, on a CPU."""
    model, idx = routed(tiny, granularity=granularity, kv=kv), tokens()
    expected = model.generate(idx, 9, lengths=LENGTHS)
    monkeypatch.setattr(graph, "triton_module", lambda: SimpleNamespace())
    assert all(graph.can_capture(skip, None) for skip in mindskips(model).values())
    replays = replay_eagerly(monkeypatch)
    assert torch.equal(model.generate(idx, 9, lengths=LENGTHS), expected)
    assert len(replays) == 1


@torch.no_grad()
def test_a_short_prompt_on_cuda(tiny, monkeypatch):
    """Which computes all, without a wait."""
    model, idx = routed(tiny), tokens()
    expected = model(idx, lengths=LENGTHS)
    monkeypatch.setattr(skipping, "run_tokens", skipping.run_all)
    torch.testing.assert_close(real(model(idx, lengths=LENGTHS)), real(expected), atol=1e-5, rtol=1e-4)


def test_a_file_keeps_the_constants(tiny, tmp_path):
    model, idx = routed(tiny), tokens()
    save_routers(model, tmp_path / "routers.safetensors")
    other = Llama.from_pretrained(tiny)
    load_routers(other, tmp_path / "routers.safetensors")
    with torch.no_grad():
        assert torch.equal(other(idx), model(idx))


@torch.no_grad()
def test_mean_updates(tiny):
    model = routed(tiny)
    texts = [Sample(row[:n].tolist(), [True] * n, 1) for row, n in zip(tokens(), LENGTHS.tolist())]
    means = constant.mean_updates(model, texts)
    updates = [[] for _ in model.layers]
    for text in texts:
        idx = torch.tensor([text.ids])
        x, ctx = model.embed(idx), model.context(idx)
        for i, layer in enumerate(model.layers):
            y = layer.attn(x, ctx)
            updates[i].append((y - x)[0])
            x = layer.mlp(y)
    for mean, layer_updates in zip(means, updates, strict=True):
        torch.testing.assert_close(mean, torch.cat(layer_updates).mean(0), atol=1e-6, rtol=1e-4)
    assert not any(layer.attn._forward_hooks for layer in model.layers)


@torch.no_grad()
def test_a_static_drop_leaves_the_means(tiny):
    """eval.py's static variant, which closes an attention, then adds the mean of what it adds."""
    model, idx = Llama.from_pretrained(tiny), tokens()
    args = SimpleNamespace(static=[1], static_data=str(DEFAULT_DATA))
    setters = {"dense": lambda: remove_routers(model), "static": lambda: add_routers(model, layers="2")}
    setters = constant.with_means(lambda *_: setters, model, Tokenizer.from_pretrained(tiny), args)
    assert not mindskips(model)
    setters["static"]()
    skip, dense_logits = mindskips(model)[2], Llama.from_pretrained(tiny)(idx)
    ctx = model.context(idx)
    x = torch.randn(8, 40, model.config.n_embd)
    mean = skip(x, ctx) - x
    torch.testing.assert_close(mean, mean[:1, :1].expand_as(mean))
    samples, _ = read_samples(DEFAULT_DATA, Tokenizer.from_pretrained(tiny), 512)
    means = constant.mean_updates(Llama.from_pretrained(tiny), samples[:constant.MEAN_TEXTS])
    torch.testing.assert_close(mean[0, 0], means[2], atol=1e-5, rtol=1e-4)
    setters["dense"]()
    assert torch.equal(model(idx), dense_logits)


def test_its_commands(arguments, tmp_path):
    """Tuned and evaluated beside a static drop with means; eval.py refuses its file by name."""
    def run(*command):
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    fork, tiny = ROOT / "examples" / "constant.py", arguments[1]
    done = run(fork, "train_router", *arguments)
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    data = arguments[3]
    text = ["--model", tiny, "--text", data, "--last", 3, "--static", 1, "--static-data", data]
    done = run(fork, "eval", *text, "--routers", tmp_path / "out" / "routers.safetensors")
    assert done.returncode == 0 and "with the mean" in done.stdout, done.stderr
    done = run(ROOT / "eval.py", *text, "--routers", tmp_path / "out" / "routers.safetensors")
    assert done.returncode == 1 and "'constant'" in done.stderr and "Traceback" not in done.stderr
    assert run(fork).returncode == 1
