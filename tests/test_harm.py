"""Harm against removing and forcing by hand, the regression against its closed form."""
from types import SimpleNamespace

import pytest
import torch
from conftest import open_gates_at_random
from safetensors.torch import load_file

import train_router
from harm import RIDGE, fit, measure, tune
from model import Llama
from recipe import BY_HARM
from router import GATES, LinearRouter, add_routers, capacity, close_all, dense, mindskips
from support.batches import Batch
from support.data import DEFAULT_DATA, read_samples
from tokenizer import Tokenizer


@pytest.fixture
def groups(tiny):
    samples, _ = read_samples(DEFAULT_DATA, Tokenizer.from_pretrained(tiny), 512)
    return [Batch.of(samples[:3], "cpu"), Batch.of(samples[3:5], "cpu")]


def answers_kl(p, q, batch):
    """KL(p || q) of models' logits in float64, summed over each row's answer."""
    p, q = (logits.double().log_softmax(-1) for logits in (p, q))
    return ((p.exp() * (p - q)).sum(-1) * batch.scored).sum(1)


def test_harm_of_open_gates_is_that_of_removing_the_attention(tiny, groups):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token")
    for batch in groups:
        harm, _, is_open, now = measure(model, batch)
        assert is_open.all() and now.abs().max() < 1e-4
        for layer in range(4):
            without = Llama.from_pretrained(tiny)
            without.layers[layer].attn.o.weight.data.zero_()
            with torch.no_grad(), dense(model):
                kl = answers_kl(model(batch.idx, batch.lengths), without(batch.idx, batch.lengths), batch)
            assert harm[:, layer].tolist() == pytest.approx(kl.tolist(), rel=1e-3)


@pytest.mark.parametrize("part", ["attn", "mlp", "block"])
def test_harm_among_mixed_decisions(part, tiny, groups):
    """Each gate closed and opened by hand, for all sequences at once, the others as they decide."""
    model, batch = add_routers(Llama.from_pretrained(tiny), f"{part}_sequence"), groups[0]
    gates, is_open = mindskips(model), torch.zeros(1)

    def run():
        with torch.no_grad():
            return model(batch.idx, batch.lengths, batch.prompt_lengths)

    with dense(model):
        reference = run()
    while is_open.all() or not is_open.any():
        open_gates_at_random(model)
        harm, inputs, is_open, now = measure(model, batch)
    assert now.tolist() == pytest.approx(answers_kl(reference, run(), batch).tolist(), rel=1e-3)
    assert float(is_open.float().mean()) == pytest.approx(capacity(model)) and 0 < capacity(model) < 1
    for n, gate in enumerate(gates.values()):
        logits = gate.router(inputs[:, n])[:, 0]
        assert torch.equal(logits >= 0, is_open[:, n])
        kl = []
        for forced in 30.0, -30.0:
            hook = gate.router.register_forward_hook(lambda *_, v=forced: torch.full((3, 1), v))
            kl.append(answers_kl(reference, run(), batch))
            hook.remove()
        assert (harm[:, n] - (kl[1] - kl[0])).abs().max() < 1e-3 * max(1, float(kl[1].max()))


class First(LinearRouter):
    """A linear gate that reads the prompt's mean and its first token."""

    def __init__(self, n_embd, scope, pool="prompt"):
        super().__init__(2 * n_embd, scope, pool)

    def pooled(self, h, ctx):
        return torch.cat((super().pooled(h, ctx), h[:, 0]), -1)


def test_gates_that_read_more(tiny, call, tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "first", First)
    flags = "--granularity", "attn_sequence", "--gate", "first", "--steps", 2, "--out", tmp_path / "out"
    status, said = call(train_router.main, "--model", tiny, "--device", "cpu", *flags)
    assert status == 0, said
    assert load_file(tmp_path / "out" / "routers.safetensors")["layers.1.weight"].shape == (1, 96)


class Shifted(LinearRouter):
    """A gate with a parameter that no regression fits."""

    def __init__(self, n_embd, scope, pool="prompt"):
        super().__init__(n_embd, scope, pool)
        self.shift = torch.nn.Parameter(torch.zeros(n_embd))


def test_gates_that_it_cannot_fit(tiny, call, tmp_path, monkeypatch):
    monkeypatch.setitem(GATES, "shifted", Shifted)
    flags = "--granularity", "attn_sequence", "--gate", "shifted", "--steps", 2, "--out", tmp_path / "out"
    status, said = call(train_router.main, "--model", tiny, "--device", "cpu", *flags)
    assert status == 1 and "--method harm: only for linear gates" in said


def test_an_override_is_heard_and_kept(tiny, groups):
    """What a gate does is what its override says, whatever its router would."""
    model = add_routers(Llama.from_pretrained(tiny), "attn_sequence")
    mindskips(model)[1].override = close_all
    harm, _, is_open, _ = measure(model, groups[0])
    assert not is_open[:, 1].any() and is_open[:, [0, 2, 3]].all() and harm[:, 1].abs().min() > 0
    assert mindskips(model)[1].override is close_all


@pytest.mark.parametrize("share", [1.0, 0.6, 0.25])
def test_fit_is_ridge_regression_with_the_capacity_asked_for(share, tiny):
    model = add_routers(Llama.from_pretrained(tiny), "attn_sequence")
    x = torch.randn(70, 4, 48) * 0.05 + 0.3
    truth = 3 + torch.randn(48)
    harm = (x @ truth + torch.randn(70, 4) * 0.1 - torch.arange(4)).clamp(min=0) ** 2
    fit(model, harm, x, share)
    logits, predicted = [], []
    for n, gate in enumerate(mindskips(model).values()):
        a, y = x[:, n].double(), harm[:, n].double().sqrt()
        centred = a - a.mean(0)
        ridge = RIDGE * centred.square().sum(1).mean() * torch.eye(48)
        w = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (y - y.mean()))
        predicted.append(centred @ w + y.mean())
        logits.append(gate.router(x[:, n])[:, 0].detach().double())
    predicted, logits = torch.stack(predicted), torch.stack(logits)
    assert float((logits >= 0).double().mean()) == pytest.approx(share, abs=0.005)
    unit = (predicted.max() - predicted.min()) / (logits.max() - logits.min())
    assert ((predicted - predicted.mean()) - (logits - logits.mean()) * unit).abs().max() < 1e-4


def test_the_capacity_of_a_step_counts_every_sequence(tiny, groups):
    model, logged = add_routers(Llama.from_pretrained(tiny), "attn_sequence"), []
    shares = [torch.tensor(0.0)] * 2
    while shares[0] / 3 == shares[1] / 2:                 # else the mean of batches would be the same
        open_gates_at_random(model)
        shares = [measure(model, batch)[2].float().mean(1).sum() for batch in groups]
    run = SimpleNamespace(checkpoint=None, n_steps=1, steps=lambda: [0], is_due=lambda step: False,
                          check_finite=lambda step, loss: None, log=lambda step, **row: logged.append(row))
    tune(model, iter([[(0, batch) for batch in groups]]), BY_HARM, 0.5, run)
    assert logged[0]["capacity"] == pytest.approx(float(sum(shares)) / 5) and 0 < logged[0]["capacity"] < 1


def test_biases_alone_are_the_same_for_every_sequence(tiny):
    model = add_routers(Llama.from_pretrained(tiny), "attn_sequence")
    harm = torch.rand(20, 4) + torch.tensor([3.0, 0.0, 2.0, 1.0])
    fit(model, harm, torch.randn(20, 4, 48), 0.5, biases_only=True)
    gates = list(mindskips(model).values())
    assert [float(gate.router.bias.detach()) > 0 for gate in gates] == [True, False, True, False]
    assert not any(gate.router.weight.any() for gate in gates)
