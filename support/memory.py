"""How many tokens a tuning step may have on a GPU: what layers keep for backward, and what is free."""
import torch

SHARE = 0.8      # of the free memory that a step may take; the rest is for fragments and the optimizer


def step_bytes(config, n_layers, n_tokens, itemsize, chunk):
    """Bytes that a tuning step needs beside the weights, at its peak, in numbers of `itemsize` bytes.

    n_layers: those from the first router on. For each token they keep three times the residual stream (before
    and after the sublayers), queries, keys, values and what attention gives, the MLP's gate and up, and one
    float32 copy that the router reads. chunk: tokens whose logits exist at once, three times, in float32.
    """
    C, heads = config.n_embd, config.head_dim * (config.n_head + config.n_kv_head)
    per_layer = itemsize * (3 * C + 2 * heads + 2 * config.intermediate) + 4 * C
    logits = 3 * 4 * chunk * config.vocab_size
    return n_tokens * (n_layers * per_layer + 2 * itemsize * C) + logits


def tokens_that_fit(model, first_router, most, chunk):
    """At most `most` tokens per batch, fewer where the GPU's free memory does not hold a step of so many.
    first_router: the layer of the first router; chunk: as for step_bytes."""
    weight = model.embed.weight
    if weight.device.type != "cuda":
        return most
    torch.cuda.empty_cache()                         # PyTorch keeps what was freed: it is free, too
    free = SHARE * torch.cuda.mem_get_info(weight.device)[0]
    tokens, n_layers = most, len(model.layers) - first_router
    while tokens > 64 and step_bytes(model.config, n_layers, tokens, weight.itemsize, chunk) > free:
        tokens //= 2
    return tokens
