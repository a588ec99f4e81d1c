"""The loss of a batch and its gradient, a chunk of tokens at a time.

A batch's logits are vocab_size numbers per token, more than everything else together. So they exist for CHUNK
tokens at a time: the gradient of each chunk goes back to the last residual stream, and from there through the
layers in one go. Layers below the first router need no autograd graph, and where the dense model is the same
model, their output serves both.

LOSSES has the losses by name: functions (log_q, targets, log_p) -> one number per token, of the routed
model's log-probabilities log_q (n, V), the next tokens (n,) and the dense model's log-probabilities log_p (n,
V), or None where the loss does not ask for them.

A Batch (support/batches.py) has token ids idx (B, T), lengths and prompt_lengths (B,), a mask `scored` (B, T)
of the N tokens whose next token is part of an answer, and `targets` (N,), those next tokens.
"""
import torch
import torch.nn.functional as F

from model import run_layers
from router import dense, mindskips

CHUNK = {"cpu": 128, "cuda": 1024}           # tokens whose logits exist at once


def kl(log_q, targets, log_p):
    """KL(p || q) in nats: how far the routed model's distribution q is from the dense model's p."""
    p = log_p.exp()
    return torch.linalg.vecdot(p, log_p) - torch.linalg.vecdot(p, log_q)


def cross_entropy(log_q, targets, log_p):
    """-log q(target) in nats; the dense model is not asked."""
    return F.nll_loss(log_q, targets, reduction="none")


kl.reads_log_p = True                        # a loss without it gets None, and saves the dense pass
LOSSES = {"kl": kl, "ce": cross_entropy}     # to add a loss, add it here


def reads_dense(loss):
    """Whether a loss, by its name, reads log_p."""
    return getattr(LOSSES[loss], "reads_log_p", False)


def chunks(x):
    """Slices of the rows of x, CHUNK at a time."""
    size = CHUNK.get(x.device.type, 128)
    return [slice(start, start + size) for start in range(0, len(x), size)]


def log_probabilities(model, x):
    """Log-probabilities of the next token, float32 (n, V), from the residual stream (n, C)."""
    return model.head(model.norm(x)).float().log_softmax(-1)


def first_active(model):
    """The first layer that has a gate or a weight that trains, or the number of layers."""
    skips, layers = mindskips(model), list(enumerate(model.layers))
    trains = [i for i, layer in layers if any(parameter.requires_grad for parameter in layer.parameters())]
    return min([*skips, *trains], default=len(layers))


def hidden_states(model, batch, teacher=None):
    """The last residual stream at the scored tokens, (N, C), of the routed model and of the dense `teacher`
    (None without one). A model can be its own teacher: the layers below its first router then run once for
    both."""
    all_train = model.embed.weight.requires_grad                     # all weights, not only the routers'
    first = first_active(model) if teacher in (None, model) else 0   # layers below run once, for both passes
    ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
    with torch.set_grad_enabled(all_train and torch.is_grad_enabled()):
        below = run_layers(model.layers[:first], model.embed(batch.idx), ctx)
    reference = None
    if teacher is not None:
        with torch.no_grad(), dense(teacher):
            x = below if teacher is model else teacher.embed(batch.idx)
            reference = run_layers(teacher.layers[first:], x, ctx)[batch.scored]
    return run_layers(model.layers[first:], below, ctx)[batch.scored], reference


def backward(model, batch, loss, weight=1.0, regularizer=None, teacher=None):
    """Add the gradients of a batch to what trains; returns `weight` times the sum of its tokens' losses, a
    tensor.

    loss: a name in LOSSES. regularizer: a function without arguments, called after the forward pass; its
    result, a scalar computed from the gates, is differentiated too, but is not in what is returned. teacher:
    the dense model (default: the model with its gates bypassed).
    """
    teacher = teacher or model
    x, reference = hidden_states(model, batch, teacher if reads_dense(loss) else None)
    leaf = x.detach().requires_grad_()                               # collects the chunks' gradients
    total = 0.0
    for chunk in chunks(leaf):
        log_p = None
        if reference is not None:
            with torch.no_grad():
                log_p = log_probabilities(teacher, reference[chunk])          # (n, V)
        log_q = log_probabilities(model, leaf[chunk])
        chunk_loss = LOSSES[loss](log_q, batch.targets[chunk], log_p).sum() * weight
        chunk_loss.backward()
        total = total + chunk_loss.detach()
        del log_p, log_q, chunk_loss                                          # before the next chunk's
    outputs, gradients = [x], [leaf.grad]
    if regularizer is not None:
        outputs, gradients = [x, regularizer()], [leaf.grad, None]
    torch.autograd.backward(outputs, gradients)
    return total
