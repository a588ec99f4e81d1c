"""What it costs to close a gate, measured, and gates at sequence level that predict it.

The harm of a gate to a sequence is KL(dense || gate closed) - KL(dense || gate open) in nats, summed over the
sequence's answer, the other gates as they stand. At a price of lambda a gate it is best to close those whose
harm is below it: so a router has to predict the harm, and the price is its threshold. Where a gate decides
once for a whole sequence, a batch holds only a handful of decisions, and a gradient through so few is mostly
noise. There the harm is measured, a run of the layers above for each gate, and its square root is predicted
by ridge regression.
"""
import math

import torch

from router import dense, routers

RIDGE = 20.0        # of the regression, in units of the inputs' mean squared distance from their mean


def log_probabilities(model, x):
    """Log-probabilities of the next token, float32 (n, V), from the residual stream (n, C)."""
    return model.head(model.norm(x)).float().log_softmax(-1)


def divergence(log_p, log_q):
    """KL(p || q) of each token in nats, (n,)."""
    p = log_p.exp()
    return torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)     # p alone is as large as log_p


@torch.no_grad()
def measure(model, batch):
    """For each of a batch's B sequences and each of the model's G gates: the harm (B, G), what its router
    read (B, G, C) and whether it is open (B, G); and the KL of each sequence's answer (B,). In nats, float32.

    Gates at token level should be all open.
    """
    gates, seen, harm = routers(model), {}, []
    ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
    row = torch.arange(len(batch.idx), device=batch.idx.device)[:, None].expand_as(batch.scored)[batch.scored]
    with dense(model):
        log_p = log_probabilities(model, model.run(model.embed(batch.idx), ctx)[batch.scored])

    def kl(x):
        losses = divergence(log_p, log_probabilities(model, x[batch.scored]))
        return losses.new_zeros(len(batch.idx)).index_add_(0, row, losses)

    def watch(i):
        def hook(router, inputs, logit):
            seen[i] = inputs[0], torch.sigmoid(logit) >= gates[i].threshold
        return gates[i].router.register_forward_hook(hook)

    def flip(i):
        return gates[i].router.register_forward_hook(lambda *_: torch.where(seen[i][1], -30.0, 30.0))

    streams, hooks = [model.embed(batch.idx)], [watch(i) for i in gates]      # before each layer, (B, T, C)
    for layer in model.layers:
        streams.append(layer(streams[-1], ctx))
    for hook in hooks:
        hook.remove()
    now = kl(streams[-1])
    inputs, is_open = (torch.stack([seen[i][n] for i in gates], 1) for n in (0, 1))
    is_open = is_open.flatten(2).any(2)
    for n, i in enumerate(gates):
        hook = flip(i)
        other = kl(model.run(streams[i], ctx, i))
        hook.remove()
        harm.append(torch.where(is_open[:, n], other - now, now - other))
    return torch.stack(harm, 1), inputs, is_open, now


def fit(model, harm, inputs, capacity, biases_only=False):
    """Set the routers of gates at sequence level so that they predict the square root of harm (n, G) from
    inputs (n, G, C), and that overall capacity is `capacity` on these.

    Ridge regression for each gate; biases_only: its mean alone, the same for every sequence.
    """
    gates, root = list(routers(model).values()), harm.double().clamp(min=0).sqrt()
    weights, means, predicted = [], [], []
    for x, y in zip(inputs.double().unbind(1), root.unbind(1)):
        mean = x.mean(0)
        x = x - mean
        product = x @ x.T                                                     # (n, n)
        ridge = RIDGE * product.diagonal().mean().clamp(min=1e-9) * torch.eye(len(x)).to(product)
        w = x.T @ torch.linalg.solve(product + ridge, y - y.mean()) * (not biases_only)
        weights.append(w)
        means.append(y.mean() - mean @ w)
        predicted.append(x @ w + y.mean())
    predicted = torch.stack(predicted).flatten().sort().values
    closed = round((1 - capacity) * model.config.n_layer / len(gates) * len(predicted))
    price = predicted[max(0, closed - 1):closed + 1].mean() if closed else predicted[0] - predicted.std()
    unit = (predicted - price).abs().mean().clamp(min=1e-9)                   # of the logits
    for gate, w, mean in zip(gates, weights, means):
        gate.router.weight.data.copy_(w[None] / unit)
        gate.router.bias.data.fill_((mean - price) / unit)


class ByHarm:
    """Tuning by regression, for gates that read a sequence: each step measures what closing every gate costs
    the sequences of a batch, the others as they stand, and fits the routers to all that was measured."""

    def __init__(self, model, biases_only):
        self.model, self.biases_only, gates = model.eval(), biases_only, len(routers(model))
        self.harm, self.inputs = torch.zeros(0, gates), torch.zeros(0, gates, model.config.n_embd)

    def step(self, group, step, target):
        """Measure a list of batches and fit, for a capacity of `target`; returns what the log keeps."""
        opened, total, self.target = [], 0.0, target
        for batch in group:
            harm, inputs, is_open, kl = measure(self.model, batch)
            self.harm = torch.cat((self.harm, harm.cpu()))
            self.inputs = torch.cat((self.inputs, inputs.cpu()))
            opened.append(is_open.float().mean())
            total += float(kl.sum())
        if math.isfinite(total):
            fit(self.model, self.harm, self.inputs, target, self.biases_only)
        share = float(sum(opened)) / len(opened)
        return {"step": step, "loss": total / sum(len(batch.targets) for batch in group),
                "capacity": 1 - (1 - share) * harm.shape[1] / self.model.config.n_layer, "target": target}

    def state(self):
        """Tensors and a dict to continue from."""
        return {"harm": self.harm, "inputs": self.inputs}, {"target": self.target}

    def restore(self, file, numbers, _):
        self.harm, self.inputs = file.get_tensor("harm"), file.get_tensor("inputs")
        fit(self.model, self.harm, self.inputs, numbers["target"], self.biases_only)
