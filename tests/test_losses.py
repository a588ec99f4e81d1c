"""The loss in chunks against the plain one, held-out losses against a loop over samples."""
from functools import partial

import pytest
import torch
from conftest import open_gates_at_random

import losses
from model import Llama
from recipe import overall_penalty
from router import add_routers, capacity, dense, mindskips, open_shares
from scoring import evaluate
from support.batches import Batch, pack


def dense_logits(model, batch):
    with torch.no_grad(), dense(model):
        return model(batch.idx, batch.lengths, batch.prompt_lengths)


@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("layers", ["all", "2-3"])
@pytest.mark.parametrize("train", ["routers", "all"])
def test_chunked_backward_equals_the_plain_one(train, kind, layers, tiny, samples, monkeypatch):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", layers).train()
    open_gates_at_random(model, 0.5)
    batch = Batch.of(samples[:6], "cpu")
    monkeypatch.setitem(losses.CHUNK, "cpu", 7)
    weight = 1 / len(batch.targets)
    teacher = None
    if train == "all":  # the dense model that it began as
        teacher = Llama.from_pretrained(tiny)
        model.requires_grad_(True)
    loss = losses.backward(model, batch, kind, weight, partial(overall_penalty, model, 3.0, None), teacher)
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits = model(batch.idx, batch.lengths, batch.prompt_lengths)
    log_q = logits[:, :-1].log_softmax(-1)
    wanted = batch.idx[:, 1:]
    mask = batch.scored[:, :-1]
    if kind == "ce":
        plain = -log_q.gather(2, wanted[..., None])[..., 0]
    else:
        log_p = dense_logits(model, batch)[:, :-1].log_softmax(-1)
        plain = (log_p.exp() * (log_p - log_q)).sum(-1)
    plain = plain[mask].mean()
    (plain + 3.0 * sum(open_shares(model), 4 - len(mindskips(model))) / 4).backward()
    assert float(loss) == pytest.approx(plain.item(), rel=1e-4)
    assert len(grads) == (2 * len(mindskips(model)) if train == "routers" else len(list(model.parameters())))
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert (p.grad - grads[name]).abs().max() < 1e-4 * p.grad.abs().max() + 1e-7


def test_layers_below_the_first_router_run_once_and_without_a_graph(tiny, samples):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", "2-3").train()
    runs, graphs = [0] * 4, [None] * 4

    def hook(layer, _, y):
        i = list(model.layers).index(layer)
        runs[i], graphs[i] = runs[i] + 1, y.requires_grad

    for layer in model.layers:
        layer.register_forward_hook(hook)
    losses.hidden_states(model, Batch.of(samples[:4], "cpu"), model)
    assert runs == [1, 1, 2, 2] and graphs == [False, False, True, True]


def test_evaluate_equals_a_plain_loop(tiny, samples):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token")
    open_gates_at_random(model, 0.5)
    result = evaluate(model, (Batch.of(group, "cpu") for group in pack(samples, 300)))
    ce = kl = n = opened = tokens = 0
    for s in samples:
        batch = Batch.of([s], "cpu")
        p = dense_logits(model, batch)[batch.scored].double().log_softmax(-1)
        with torch.no_grad():
            q = model(batch.idx, prompt_lengths=batch.prompt_lengths)[batch.scored].double().log_softmax(-1)
        opened, tokens = opened + capacity(model) * len(s.ids), tokens + len(s.ids)
        ce, kl = ce - q.gather(1, batch.targets[:, None]).sum(), kl + (p.exp() * (p - q)).sum()
        n += len(batch.targets)
    assert result["tokens"] == n and result["capacity"] == pytest.approx(opened / tokens, abs=1e-6)
    assert result["loss"] == pytest.approx(float(ce) / n, rel=1e-4)
    assert result["kl"] == pytest.approx(float(kl) / n, rel=1e-3)
