"""The harm of closing a gate, measured as KL, and sequence-level routers that are fitted to predict it.

The harm of a gate to a sequence is KL(dense || gate closed) - KL(dense || gate open) in nats, summed over the
sequence's answer. Gates in lower layers stay as they are; those in higher layers may change in response. If
an open gate costs mu, it is best to close those whose harm is below mu: a router has to predict the harm, and
its threshold is the price (of both the square roots, see `fit`). With one gate per sequence a batch holds
only a handful of decisions, and a gradient through so few is mostly noise. So the harm is measured, by
running a gate's layer and those above once per gate, and its square root is predicted by ridge regression.
"""
import torch

from losses import chunks, kl, log_probabilities
from model import run_layers
from router import dense, mindskips, overall_capacity, trace
from support import parallel

RIDGE = 20.0        # ridge penalty, times the inputs' mean squared distance from their mean


@torch.no_grad()
def measure(model, batch):
    """What closing each of the model's G gates costs each of a batch's B sequences.

    Returns the harm (B, G) in nats, the routers' inputs (B, G, C), which gates are open (B, G), bool, and the
    KL of each sequence's answer (B,). Gates at token level must all be open; then inputs are (B, G, T, C).
    """
    skips = mindskips(model)
    ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
    at = batch.scored.flatten().nonzero().squeeze(1)                          # once: a sync on CUDA
    with dense(model):
        x = run_layers(model.layers, model.embed(batch.idx), ctx)
        x = x.flatten(0, 1)[at]                                               # (N, C)
        log_p = [log_probabilities(model, x[chunk]) for chunk in chunks(x)]   # (n, V) each, N in all

    def answers_kl(x):
        x = x.flatten(0, 1)[at]
        token_kl = torch.cat([kl(log_probabilities(model, x[chunk]), batch.targets[chunk], chunk_log_p)
                              for chunk, chunk_log_p in zip(chunks(x), log_p)])
        return token_kl.new_zeros(batch.scored.shape).masked_scatter(batch.scored, token_kl).sum(1)    # (B,)

    inputs = []
    hooks = [skip.router.register_forward_pre_hook(lambda router, args: inputs.append(args[0]))
             for skip in skips.values()]
    streams = [model.embed(batch.idx)]                                        # before each layer, (B, T, C)
    with trace(model) as decisions:
        for layer in model.layers:
            streams.append(layer(streams[-1], ctx))
    for hook in hooks:
        hook.remove()

    base_kl = answers_kl(streams[-1])                                         # (B,)
    harm, opened = [], []
    for i, skip in skips.items():
        [is_open] = decisions[i]                                              # (B,), or (B, T) at token level
        opposite, outer = (~is_open).float(), skip.override
        skip.override = lambda score, ctx, scores=opposite: scores
        flipped = answers_kl(run_layers(model.layers[i:], streams[i], ctx))
        skip.override = outer
        was_open = is_open.view(len(is_open), -1).any(1)                      # (B,)
        harm.append(torch.where(was_open, flipped - base_kl, base_kl - flipped))
        opened.append(was_open)
    return torch.stack(harm, 1), torch.stack(inputs, 1), torch.stack(opened, 1), base_kl


def ridge_regression(x, y):
    """Weights (C,) and intercept of a prediction of y (n,) from x (n, C), float64. The norm of the weights
    costs RIDGE times the mean squared distance of the inputs from their mean."""
    x_mean, y_mean = x.mean(0), y.mean()
    x = x - x_mean
    gram = x @ x.T                                                            # (n, n)
    ridge = RIDGE * gram.diagonal().mean().clamp(min=1e-9)
    solution = torch.linalg.solve(gram + ridge * torch.eye(len(x)).to(gram), y - y_mean)
    w = x.T @ solution
    return w, y_mean - x_mean @ w


def fit(model, harm, inputs, capacity, biases_only=False):
    """Set the routers of gates at sequence level so that they predict the square root of harm (n, G) from
    inputs (n, G, C), and that overall capacity is `capacity` on these. biases_only: predict the mean of each
    gate.

    The root makes the few largest harms weigh less; which gates are closed depends on the order alone.
    """
    skips = list(mindskips(model).values())
    root = harm.double().clamp(min=0).sqrt()
    predictors, predicted = [], []
    for x, y in zip(inputs.double().unbind(1), root.unbind(1)):
        w, intercept = ridge_regression(x, y)
        if biases_only:
            w, intercept = torch.zeros_like(w), y.mean()
        predictors.append((w, intercept))
        predicted.append(x @ w + intercept)
    predicted = torch.stack(predicted).flatten().sort().values

    # the cut: the n_closed gates of least predicted harm lie below it (edges: one more harm at each end)
    n_closed = round((1 - capacity) * model.config.n_layer / len(skips) * len(predicted))
    margin = predicted.std(correction=0).clamp(min=1e-9)
    edges = torch.cat((predicted[:1] - margin, predicted, predicted[-1:] + margin))
    cut = edges[n_closed:n_closed + 2].mean()
    # the score is sigmoid((predicted - cut) / unit), whose logits have mean absolute value 1
    unit = (predicted - cut).abs().mean().clamp(min=1e-9)
    for skip, (w, intercept) in zip(skips, predictors):
        skip.router.weight.data.copy_(w[None] / unit)
        skip.router.bias.data.fill_((intercept - cut) / unit)


def tune(model, source, recipe, capacity, run):
    """Tuning by regression: each step measures what closing every gate costs the sequences of its batches,
    see `measure`, and fits the routers to all that was measured. Arguments as in train_router.tune."""
    model.eval()
    skips = list(mindskips(model).values())
    n_gates, n_read = len(skips), skips[0].router.weight.shape[1]
    biases_only = recipe.train == "bias"
    state = {"harm": torch.zeros(0, n_gates), "inputs": torch.zeros(0, n_gates, n_read)}
    if run.checkpoint:
        harm = run.tensor("harm", (None, n_gates))
        state = {"harm": harm, "inputs": run.tensor("inputs", (*harm.shape, n_read))}
        fit(model, harm, state["inputs"], float(run.tensor("target", ())), biases_only)
    for step in run.steps():
        target = recipe.target(step, run.n_steps, capacity)
        rows = []
        for (_, batch), is_counted in parallel.share(next(source)):
            harm, inputs, is_open, sequence_kl = measure(model, batch)
            if is_counted:
                n_open, batch_kl = int(is_open.sum()), float(sequence_kl.sum())
                rows.append((harm.cpu(), inputs.cpu(), batch_kl, len(batch.targets), n_open))
        harms, read, kls, n_tokens, open_counts = zip(*parallel.gathered(rows))
        state["harm"] = torch.cat([state["harm"], *map(torch.as_tensor, harms)])
        state["inputs"] = torch.cat([state["inputs"], *map(torch.as_tensor, read)])
        run.check_finite(step, sum(kls))
        fit(model, state["harm"], state["inputs"], target, biases_only)
        share = sum(open_counts) / (n_gates * sum(map(len, harms)))
        capacity_before = overall_capacity([share] * n_gates, model.config.n_layer)
        run.log(step, loss=sum(kls) / sum(n_tokens), capacity=capacity_before, target=target)
        if run.is_due(step):
            run.save(step, state | {"target": torch.tensor(target, dtype=torch.float64)})
