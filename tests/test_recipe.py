"""Recipes: PAPER against its formulas in float64, the small objects of DEFAULT against theirs."""
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import open_gates_at_random, write_data
from safetensors import safe_open

import calibration
import losses
import recipe
import train_router
from calibration import (
    calibrate,
    calibration_batches,
    calibration_sources,
    later_steps,
    measured_capacity,
    shifted,
)
from model import Llama
from recipe import DEFAULT, PAPER, Penalty, choose_recipe, own_text, ramp
from router import add_routers, capacity, mindskips, straight_through, trace
from support.batches import Batch, common_prefix
from support.data import pieces, read_samples


@pytest.fixture(autouse=True)
def short_calibration():
    """In the place of conftest.py's: calibration as it is."""


# ------------------------------------------------------------------------------------------------------ PAPER


def reference_loss(model, batch, granularity, price, target):
    """PAPER's loss in float64, written out: ({layer: w}, the loss, {layer: gates})."""
    config, rows = model.config, torch.arange(len(batch.idx))
    weight = {name: p.detach().double() for name, p in model.named_parameters()}
    T, D, H, K = batch.idx.shape[1], config.head_dim, config.n_head, config.n_kv_head
    real = torch.arange(T) < batch.lengths[:, None]

    def norm(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w

    def rotated(x):                                                        # (B, heads, T, D)
        angle = torch.arange(T)[:, None] / config.rope_theta ** (torch.arange(0, D, 2).double() / D)
        a, b = x[..., :D // 2], x[..., D // 2:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    x, routers_w, gates, penalty = weight["embed.weight"][batch.idx], {}, {}, 0.0
    for i in range(config.n_layer):
        def of(name, i=i):
            return weight[f"layers.{i}.{name}"]
        h = norm(x, of("attn.sublayer.norm.weight"))
        w = routers_w[i] = of("attn.router.weight")[0].requires_grad_()
        read = h if granularity == "attn_token" else (h * real[..., None]).sum(1) / batch.lengths[:, None]
        s = 1 / (1 + torch.exp(-read @ w))
        hard = (s >= 0.5).double()
        gate = hard + s - s.detach()
        gates[i] = hard
        mean = (gate * real).sum() / real.sum() if gate.dim() == 2 else gate.mean()
        penalty = penalty + price * torch.clamp(mean - target, min=0)

        y = (h @ of("attn.sublayer.qkv.weight").T).view(len(rows), T, H + 2 * K, D).transpose(1, 2)
        q, k, v = rotated(y[:, :H]), rotated(y[:, H:H + K]), y[:, H + K:]
        k, v = k.repeat_interleave(H // K, 1), v.repeat_interleave(H // K, 1)
        score = q @ k.mT / D**0.5
        score = score.masked_fill(~torch.ones(T, T, dtype=torch.bool).tril(), -math.inf)
        y = (score.softmax(-1) @ v).transpose(1, 2).flatten(2) @ of("attn.sublayer.o.weight").T
        x = x + (gate[..., None] if gate.dim() == 2 else gate[:, None, None]) * y
        gate_up = norm(x, of("mlp.norm.weight")) @ of("mlp.gate_up.weight").T
        a, b = gate_up.chunk(2, -1)
        x = x + (a / (1 + torch.exp(-a)) * b) @ of("mlp.down.weight").T
    log_q = (norm(x, weight["norm.weight"]) @ weight["head.weight"].T).log_softmax(-1)
    nll = -log_q[batch.scored].gather(1, batch.targets[:, None])
    return routers_w, nll.mean() + penalty, gates


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_the_papers_gradient_and_step_against_float64(granularity, tiny, samples):
    """Cross-entropy + lambda sum relu(c - c*), straight through; clipped to norm 1; one step of AdamW."""
    model = Llama.from_pretrained(tiny)
    add_routers(model, granularity, gate="unbiased", pool="all")
    batch, price, target = Batch.of(samples[:8], "cpu"), 3.0, 0.2
    for _ in range(20):                                                     # until gates are open and closed
        open_gates_at_random(model)
        with torch.no_grad():
            model(batch.idx, batch.lengths)
        if 0.2 < capacity(model) < 0.9:
            break
    w64, loss64, gates64 = reference_loss(model, batch, granularity, price, target)
    expected = dict(zip(w64, torch.autograd.grad(loss64, list(w64.values()))))

    with trace(model.train()) as decisions:
        loss = losses.backward(model, batch, PAPER.loss, 1 / len(batch.targets),
                               lambda: PAPER.regularizer(model, price, target))
    real = torch.arange(batch.idx.shape[1]) < batch.lengths[:, None]
    for i, (is_open,) in decisions.items():
        same = is_open.double() == gates64[i]
        assert (same[real] if granularity == "attn_token" else same).all()
    assert 0.2 < capacity(model) < 0.9                                      # the penalty acts, gates differ
    with torch.no_grad():
        penalty = PAPER.regularizer(model, price, target)
    assert float(loss + penalty) == pytest.approx(loss64.item(), rel=1e-5) and float(penalty) > 0
    for i, skip in mindskips(model).items():
        assert skip.router.bias is None
        error = skip.router.weight.grad[0].double() - expected[i]
        assert error.abs().max() < 1e-4 * expected[i].abs().max()

    # one step of the loop, from here: all steps are one, so that the warm-up is over at once
    model.zero_grad(set_to_none=True)
    before = {i: skip.router.weight.detach().double()[0] for i, skip in mindskips(model).items()}
    recipe = dataclasses.replace(PAPER, penalty=price)
    lines, state = [], {}
    run = SimpleNamespace(checkpoint=None, n_steps=1, steps=lambda: range(1), check_finite=lambda *_: None,
                          log=lambda step, **numbers: lines.append(numbers), is_due=lambda step: True,
                          save=lambda step, tensors: state.update(tensors))
    train_router.tune(model, iter([[(0, batch)]]), recipe, target, run)
    total = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert total > 1 and lines[0]["lr"] == 1e-5 and lines[0]["lambda"] == price
    shrunk = grown = 0.0
    for i, skip in mindskips(model).items():
        g = expected[i] / (total + 1e-6)                                    # clipped to norm 1
        m, v = 0.1 * g, 0.001 * g.square()
        for key, moment in ("m", m), ("v", v):
            error = state[f"layers.{i}.attn.router.weight.{key}"][0] - moment
            assert error.abs().max() < 2e-4 * moment.abs().max()
        step = 1e-5 * (m / (1 - 0.9)) / ((v / (1 - 0.999)).sqrt() + 1e-8)
        moved = skip.router.weight.detach().double()[0] - before[i]
        clear = g.abs() > 1e-5                                              # not rounding's sign
        assert clear.double().mean() > 0.9
        assert (moved + step)[clear].abs().max() < 1e-7                     # float32 has 3e-8 at 0.3
        assert moved.abs().max() < 1.01e-5
        shrunk += ((moved + step) * before[i])[clear].sum()
        grown += before[i].square().sum()
    assert abs(shrunk / grown) < 2e-8                                       # no weight decay


def test_the_papers_values():
    assert (PAPER.loss, PAPER.gate, PAPER.pool, PAPER.train) == ("ce", "unbiased", "all", "routers")
    assert (PAPER.penalty, PAPER.moves_penalty, PAPER.clip) == (0, False, 1.0)
    assert (PAPER.step_samples, PAPER.epochs) == (64, 1)
    assert not PAPER.learns_own_text and not PAPER.calibrates and PAPER.target(0, 100, 0.5) == 0.5
    assert PAPER.gate_estimator(0, 100) is straight_through
    rates = [PAPER.learning_rate(step, 100, PAPER.lr) for step in range(100)]
    for step, rate in enumerate(rates):                                     # 3 % warm-up, then a cosine to 0
        expected = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 97))
        assert rate == pytest.approx(1e-5 * expected, rel=1e-9)
    assert PAPER.learning_rate(100, 100, 1e-5) == pytest.approx(0, abs=1e-20)


def test_the_papers_gates_begin_on_the_threshold_and_open(tiny):
    model = add_routers(Llama.from_pretrained(tiny), "attn_token", gate="unbiased")
    h = torch.randn(2, 5, 48)
    for skip in mindskips(model).values():
        assert [name for name, _ in skip.router.named_parameters()] == ["weight"]
        assert (skip.score(h, None) == 0.5).all()
    with torch.no_grad():
        model(torch.arange(20)[None])
    assert capacity(model) == 1


def test_the_papers_recipe_from_end_to_end(arguments, call, tmp_path, monkeypatch):
    monkeypatch.setattr(Llama, "generate", None)                            # it writes no text
    run = [a for a in arguments if a not in ("--steps", 12)]
    status, said = call(train_router.main, *run, "--recipe", "paper")
    assert status == 0 and "recipe paper, held out" in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 1 and lines[0]["lambda"] == 0                      # 32 samples: one step of an epoch
    assert lines[0]["capacity"] == 1 and lines[0]["lr"] == 1e-5
    file = safe_open(str(tmp_path / "out" / "routers.safetensors"), "pt")
    meta = file.metadata()
    assert meta["gate"] == "unbiased" and meta["pool"] == "all" and meta["calibration"] == "[]"
    assert meta["threshold"] == "0.5" and set(file.keys()) == {f"layers.{i}.weight" for i in range(4)}
    moved = torch.cat([file.get_tensor(key).flatten() for key in file.keys()]).abs()
    assert moved.max() == pytest.approx(1e-5, rel=1e-3)
    status, said = call(train_router.main, *run, "--recipe", "paper", "--steps", 3, "--penalty", 0.5,
                        "--pool", "prompt", "--granularity", "attn_sequence")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert status == 0 and len(lines) == 3 and all(line["lambda"] == 0.5 for line in lines)
    status, said = call(train_router.main, *run, "--recipe", "paper", "--epochs", 3, "--max-samples", 9,
                        "--clip", 0.01)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert status == 0 and len(lines) == 3                                  # 9 samples are one step
    status, said = call(train_router.main, *run, "--recipe", "paper", "--granularity", "attn_sequence",
                        "--loss", "kl", "--method", "harm")
    assert status == 1 and "with a bias" in said


def test_an_epoch_of_the_paper_takes_each_sample_once(arguments, call, tok, tmp_path, monkeypatch):
    """200 samples, of which 40 are held out: steps of 64, 64 and 32, at the rates of the schedule."""
    data, steps, make_source = write_data(tmp_path / "data.jsonl", 200), [], train_router.make_source

    def recording(*given):
        return (steps.append(batches) or batches for batches in make_source(*given))

    monkeypatch.setattr(train_router, "make_source", recording)
    run = [a for a in arguments if a not in ("--steps", 12)]
    assert call(train_router.main, *run, "--recipe", "paper", "--penalty", 0.1)[0] == 0
    rows = []
    for batches in steps:
        rows.append([ids[:n].tolist() for _, batch in batches for ids, n in zip(batch.idx, batch.lengths)])
    assert [len(some) for some in rows] == [64, 64, 32]
    expected = [sample.ids for sample in read_samples(data, tok, 512)[0][:-40]]
    assert sorted(sum(rows, [])) == sorted(expected)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines] == pytest.approx([1e-5, 1e-5, 5e-6])     # 3 % are less than a step
    assert {line["target"] for line in lines} == {0.7}                             # as asked, from the start


# ---------------------------------------------------------------------------------------------------- DEFAULT


def test_which_form_of_the_default_is_chosen():
    assert choose_recipe("default", "attn_token") == DEFAULT
    assert choose_recipe("default", "attn_sequence").method == "harm"
    assert choose_recipe("default", "attn_sequence").steps == 48
    for values in dict(loss="ce"), dict(train="all"), dict(method="ramp"):
        recipe = choose_recipe("default", "mlp_sequence", **values)
        assert recipe.method == "ramp" and recipe.bias_lr == 0.02 and recipe.lr == 0.0003
        assert recipe.tokens_cpu == 512                                   # gates of sequences are few
    only_biases = choose_recipe("default", "attn_token", train="bias")
    assert (only_biases.lr, only_biases.tokens_cpu) == (0.02, 512)
    assert choose_recipe("default", "attn_token", steps=7, lr=None).steps == 7
    assert choose_recipe("paper", "attn_sequence", penalty=0.1) == dataclasses.replace(PAPER, penalty=0.1)


def test_ramp_is_half_open_at_the_threshold_and_ends_as_the_step():
    score = torch.tensor([0.1, 0.3, 0.4, 0.9], dtype=torch.float64, requires_grad=True)
    gate, x = ramp(score, 0.3, 0.5), score.detach()
    odds = (x / (1 - x) / (0.3 / 0.7)) ** 2                               # 1 / width = 2
    assert (gate - odds / (1 + odds)).abs().max() < 1e-6 and gate[1] == 0.5
    gate.sum().backward()
    slope = 2 * odds / (1 + odds) ** 2 / (x * (1 - x))
    assert (score.grad - slope).abs().max() < 1e-5
    assert ramp(score, 0.3, 1e-3).round(decimals=5).tolist() == [0, 0.5, 1, 1]
    assert ramp(torch.tensor([0.0, 1.0]), 0.5, 0.1).isfinite().all()


def test_the_ramp_narrows_and_the_target_falls():
    widths = [DEFAULT.gate_estimator(step, 100).keywords["width"] for step in range(100)]
    assert widths == sorted(widths, reverse=True) and (widths[0], widths[-1]) == DEFAULT.ramp_widths
    assert widths[80:] == [DEFAULT.ramp_widths[1]] * 20
    targets = [DEFAULT.target(step, 100, 0.6) for step in range(100)]
    assert targets[0] == pytest.approx(0.992) and targets[49:] == pytest.approx([0.6] * 51)
    rates = [DEFAULT.learning_rate(step, 100, 1.0) for step in range(101)]
    assert rates[0] == 0.2 and rates[4] == rates[5] == 1 and rates[100] == pytest.approx(0.02)


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_the_model_writes_text_to_learn_from(granularity, tiny, samples):
    """The dense model's own, the same for the same seed; its beginnings calibrate the threshold."""
    model = Llama.from_pretrained(tiny)
    held, own = own_text(model, choose_recipe("default", granularity), samples, seed=3)
    again, same = own_text(model, choose_recipe("default", granularity), samples, seed=3)
    assert torch.equal(held, again) and own == same and held.shape == (64, 128)
    n, n_tokens = recipe.OWN_TEXTS - recipe.NOT_LEARNED, recipe.OWN_TOKENS
    assert sum(len(s.ids) for s in own) == n * n_tokens and all(all(s.answer) for s in own)
    answer = sum(sum(s.answer) for s in samples) // len(samples)
    assert max(len(s.ids) for s in own) == (n_tokens if granularity == "attn_token" else answer)
    assert len({tuple(s.ids) for s in own}) == len(own)
    if granularity == "attn_token":
        assert [s.ids[:128] for s in own[:40]] == held[24:].tolist()
        joined = own_text(model, choose_recipe("default", granularity), samples, seed=3, piece=300)[1]
        assert {len(s.ids) for s in joined[:-1]} == {300} and all(s.prompt == 64 for s in joined)
        assert sum((s.ids for s in joined), []) == sum((s.ids for s in own), [])
        one, *_ = own_text(model, choose_recipe("default", granularity), samples, seed=3, piece=10**6)[1]
        assert len(one.ids) == model.config.max_context
    held, own = own_text(model, choose_recipe("default", granularity, loss="ce"), samples, seed=3)
    assert own is None and held.shape == (64, 128)
    assert own_text(model, PAPER, samples, seed=3) == (None, None)


def test_the_price_settles_where_demand_meets_the_target():
    """Capacity that falls as the price rises, with noise: the target is met, at the price that meets it."""
    price, used = Penalty(2.0), []
    for _ in range(300):
        used.append(1 - 0.1 * price.level + 0.01 * float(torch.randn(())))
        price.update(used[-1] - 0.7)
        assert price.value >= 0 and price.level >= 0
    assert sum(used[-50:]) / 50 == pytest.approx(0.7, abs=0.005) and price.level == pytest.approx(3, abs=0.1)


@pytest.fixture
def calibrated(tiny, samples, monkeypatch):
    """A function (capacity_at, capacity asked for) -> (calibrate's table as a dict, the threshold it set), of
    a model whose capacity is capacity_at(logit of the threshold, whether every fourth text is read)."""
    model = add_routers(Llama.from_pretrained(tiny), "attn_token")
    skip = next(iter(mindskips(model).values()))

    def calibrate_by(capacity_at, asked):
        def capacity_of(model, batches, start):
            return capacity_at(math.log(skip.threshold / (1 - skip.threshold)), batches == ["some"])

        monkeypatch.setattr(calibration, "measured_capacity", capacity_of)
        table = calibrate(model, ([(["some"], 0)], [(["whole"], 0)]), asked)
        return dict(table), skip.threshold
    return calibrate_by


def test_calibration_relies_on_no_point_of_its_curve_twice(calibrated):
    """Where every fourth text says 0.703 and all say 0.693, beside the threshold that is looked for."""
    def capacity_at(logit, some):
        return 0.8 - 0.892 * logit + 0.01 * (some and logit > 0.1)

    table, threshold = calibrated(capacity_at, 0.7)
    assert len(table) == len(calibration.LOGITS) + 2 and table[threshold] == pytest.approx(0.7, abs=0.003)


def test_calibration_finds_a_cliff_far_from_its_curve(calibrated, capsys):
    """Gates that all close between two thresholds; and ones between which there is no capacity."""
    table, threshold = calibrated(lambda logit, some: 1 / (1 + math.exp(20 * (logit - 1))), 0.1)
    assert table[threshold] == pytest.approx(0.1, abs=0.003)
    assert "not 0.1" not in capsys.readouterr().err
    calibrated(lambda logit, some: float(logit < 1), 0.1)
    assert "capacity is 0.000, not 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [1.0, 0.0])
def test_calibration_opens_or_closes_even_gates_of_extreme_scores(asked, calibrated):
    """What was measured where the search begins, at logits of 4, is no end of it."""
    table, threshold = calibrated(lambda logit, some: 0.5 if abs(logit) < 8 else float(logit < 0), asked)
    assert table[threshold] == asked and len(table) == len(calibration.LOGITS) + 2       # one of 4, one of 16
    table, threshold = calibrated(lambda logit, some: 0.5, asked)  # and where there are none
    assert table[threshold] == 0.5


def test_a_curve_is_shifted_to_what_all_texts_give():
    """By as many spreads everywhere; where all gates are open, or closed, they stay so."""
    curve = shifted({1.0: 0.5, 0.25: 0.55, 0: 0.6, -1.0: 1.0}, 0.61, least=0.5)        # shares 0, 0.1, 0.2, 1
    assert curve[1.0] == 0.5 and curve[-1.0] == 1.0 and curve[0] == pytest.approx(0.61)
    assert (curve[0.25] - 0.55) / 0.01 == pytest.approx(math.sqrt(0.1 * 0.9) / math.sqrt(0.2 * 0.8))
    assert shifted({0: 1.0, 0.5: 0.8}, 0.9, least=0.5) == pytest.approx({0: 1.0, 0.5: 0.8})


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence"])
def test_what_follows_the_steps_is_estimated(granularity, tiny, samples, monkeypatch):
    """In tokens that are run: those of calibration to a factor of 1.5, whatever the search needs."""
    model = Llama.from_pretrained(tiny)
    add_routers(model, granularity)
    open_gates_at_random(model)
    text, n_run, real = torch.randint(0, 320, (64, 128)), [], Llama.context
    monkeypatch.setattr(Llama, "context", lambda self, idx, *rest: n_run.append(idx.numel())
                        or real(self, idx, *rest))
    sources = calibration_sources(model, samples, text, 800)
    calibrate(model, sources, 0.6)
    estimate = 6 * 800 * later_steps(model, DEFAULT, sources, [], 800)
    assert sum(n_run) / 1.5 < estimate < sum(n_run) * 1.5
    with_table = 6 * 800 * later_steps(model, DEFAULT, sources, samples[:2], 800)
    assert with_table - estimate == pytest.approx(4 * sum(len(s.ids) for s in samples[:2]))


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "block_token"])
def test_calibration_tells_which_threshold_gives_a_capacity(granularity, tiny, samples):
    model = Llama.from_pretrained(tiny)
    add_routers(model, granularity)
    open_gates_at_random(model)
    text = torch.randint(0, 320, (64, 128))
    table = sorted(calibrate(model, calibration_sources(model, samples, text, 800), 0.6))
    used = [capacity for _, capacity in table]
    assert used == sorted(used, reverse=True) and used[0] > 0.6 > used[-1]
    best = min(table, key=lambda pair: abs(pair[1] - 0.6))
    assert abs(best[1] - 0.6) < (0.05 if granularity.endswith("token") else 0.15)
    assert {gate.threshold for gate in mindskips(model).values()} == {best[0]}
    if granularity == "attn_token":  # by brute force: all tokens after the template, both sources' mean
        shares, template = [], common_prefix([s.ids for s in samples[:24]])
        assert template > 3
        for source, start in (samples[:24], template), (pieces(text.tolist(), 128), 0):
            decisions = []
            for s in source:
                with trace(model) as gates, torch.no_grad():
                    model(torch.tensor([s.ids]))
                decisions += [is_open[0, start:] for (is_open,) in gates.values()]
            shares.append(float(torch.cat(decisions).float().mean()))
        assert best[1] == pytest.approx(sum(shares) / 2, abs=1e-3)

        sources = calibration_batches(False, samples[:24], text, 800)
        for threshold, capacity in table:                # of a quarter, shifted, and what all texts have
            for gate in mindskips(model).values():
                gate.threshold = threshold
            of_all = sum(measured_capacity(model, batches, start) for batches, start in sources) / 2
            assert capacity == pytest.approx(of_all, abs=0.02)
