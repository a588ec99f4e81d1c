"""The model's matmuls and small operations, faster: every function equals plain PyTorch calls.

    here                      the plain form
    Linear, linear            F.linear
    rms_norm                  F.rms_norm
    logit, first_mean         their own bodies, which a Triton kernel replaces on CUDA
    logit_of_token            logit(norm(x), ...)
    recomputed(f, ...)        f(...)

For CUDA see support/triton_kernels.py. On CPUs in float32 MKL multiplies a few tokens faster as weight @ x.T,
and oneDNN is faster for single tokens and for wide weights; in bfloat16 weights in oneDNN's own layout
("packed") halve the time of a decoding step.
"""
import functools
import math
import os
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from support import cuda
from support.cuda import fused

ONEDNN = torch.backends.mkldnn.is_available()
MKL = torch.backends.mkl.is_available()
NATIVE_BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
FEW = 5             # most tokens for which MKL is faster at weight @ x.T than at x @ weight.T
SMALL = 2**20       # most elements of a weight for which product_of_one is faster than oneDNN


def recomputed(f, *args):
    """f(*args), whose intermediate results are computed again in the backward pass instead of being kept."""
    if not torch.is_grad_enabled():
        return f(*args)
    return checkpoint(f, *args, use_reentrant=False, preserve_rng_state=False)


# --------------------------------------------------------------------------------------------------- matmuls
def onednn_linear(x, weight, bias):
    """F.linear by oneDNN, without autograd; the weight may be packed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_of_few(x, weight):
    """x (..., in) @ weight (out, in).T of FEW tokens, as (weight @ x.T).T: there MKL reads the weights where
    they are. For x @ weight.T it lays them out first, which takes as long again."""
    return torch.mm(weight, x.flatten(0, -2).T).T.contiguous().view(*x.shape[:-1], len(weight))


def product_of_one(x, weight):
    """The same for one token. MKL multiplies a single column on one thread, so x is cut in half, into two
    columns, and each weight row too: per output, first half by first and second by second are added."""
    n_out = len(weight)
    products = torch.mm(weight.reshape(2 * n_out, -1), x.reshape(2, -1).T).view(n_out, 4)
    return (products[:, 0] + products[:, 3]).view(*x.shape[:-1], n_out)


class FrozenLinear(torch.autograd.Function):
    """onednn_linear for a frozen weight and bias: only x gets a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        return grad @ weight, None, None


def linear(x, weight, bias=None):
    """x (..., T, in) @ weight (out, in).T + bias (out,), as F.linear.

    In float32 on a CPU, without gradients, up to FEW tokens go to product_of_few, and one token with a small
    weight to product_of_one. Otherwise oneDNN computes rows of one token, and weights with out > 4 in: 1.1 to
    1.9 times as fast as MKL on AMD CPUs. It is not used elsewhere, as its rounding error is twice MKL's.
    """
    n_out, n_in = weight.shape
    if x.dtype != torch.float32 or x.device.type != "cpu" or not ONEDNN:
        return F.linear(x, weight, bias)
    n_tokens, takes_gradient = x.numel() // n_in, torch.is_grad_enabled()
    product = product_of_few if 1 < n_tokens <= FEW else None
    if n_tokens == 1 and n_in % 2 == 0 and weight.numel() <= SMALL:
        product = product_of_one
    if product and MKL and not takes_gradient:
        y = product(x, weight)
        return y if bias is None else y + bias
    if x.shape[-2] == 1 or n_out > 4 * n_in:
        if not takes_gradient:
            return onednn_linear(x, weight, bias)
        if not weight.requires_grad and (bias is None or not bias.requires_grad):
            return FrozenLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    packed = None      # in packed_weights(): {(start, end): those outputs' weight in oneDNN's layout}
    rows = 1           # input rows that this layout is made for

    def forward(self, x, start=0, end=None, plus=None):
        """F.linear for outputs start to end only, + plus, of the outputs' shape, if given."""
        weight, bias = self.weight, self.bias
        if (start, end) != (0, None):            # slicing all would cost a copy in the backward pass
            weight = weight[start:end]
            bias = None if bias is None else bias[start:end]
        kernels = cuda.triton_kernels(x) if x.numel() == x.shape[-1] else None
        if kernels:                                                          # one token
            is_open, n_gated = cuda.choices.gate
            return kernels.linear(x, weight, bias, is_open, plus, n_gated.get(self))
        if self.packed is None:
            y = linear(x, weight, bias)
        else:
            if (start, end) not in self.packed:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), self.rows)
                self.packed[start, end] = packed
            y = onednn_linear(x, self.packed[start, end], bias)
        return y if plus is None else plus + y


def should_pack(n_bytes, device, dtype):
    """Whether to pack weights of n_bytes for decoding: in bfloat16, on a CPU with native bfloat16, if a
    second copy takes less than a quarter of the memory."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return False
    if not ONEDNN or not NATIVE_BFLOAT16 or not hasattr(os, "sysconf"):
        return False
    return 4 * n_bytes < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def packed_weights(model, rows):
    """Context manager: if that pays, every Linear keeps a second copy of the parts of its weight that are
    used, in oneDNN's layout for inputs of `rows` rows.

    The copies are dropped at the end, so a weight that changes later leaves no stale one.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    weight, n_bytes = layers[0].weight, sum(layer.weight.nbytes for layer in layers)
    pays = type(weight) is nn.Parameter and should_pack(n_bytes, weight.device, weight.dtype)   # no DTensor
    if layers[0].packed is not None or not pays:     # a nested generation uses the outer one's
        yield
        return
    try:
        for layer in layers:
            layer.packed, layer.rows = {}, rows
        yield
    finally:
        for layer in layers:
            layer.packed = None


@fused
def logit(h, weight, bias=None):
    """F.linear in float32, h (..., C) of any dtype, weight (1, C)."""
    return F.linear(h.float(), weight, bias)


@fused
def first_mean(h, n, longest):
    """The mean, float32 (B, C), of the first n (B,) tokens of each row of h (B, T, C); longest: the largest
    n."""
    is_read = torch.arange(longest, device=h.device) < n[:, None]                             # (B, longest)
    return (h[:, :longest].float() * is_read[..., None]).sum(1) / n[:, None]


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension (arXiv 1910.07467)."""
    kernels = cuda.triton_kernels(x)
    if kernels and x.numel() <= 64 * x.shape[-1]:                    # for more tokens PyTorch's is as good
        return kernels.rms_norm(x, weight, eps)
    if x.is_cuda:                            # its backward needs just one more number per token
        return F.rms_norm(x, weight.shape, weight, eps)
    if x.numel() == x.shape[-1] and x.dtype != torch.float64 and not torch.is_grad_enabled():
        return normalized(x, root_mean_square(x.flatten().float(), eps), weight)     # 5 operations, not 10
    return recomputed(F.rms_norm, x, weight.shape, weight, eps)


def root_mean_square(x, eps):
    """sqrt(mean(x^2) + eps), a Python float, of one token x, float32 (C,) on a CPU."""
    return math.sqrt(x.dot(x).item() / len(x) + eps)


def normalized(x, rms, weight):
    """rms_norm of tokens whose root mean square, one number or (n, 1), is known."""
    return (x.float() / rms * weight).to(x.dtype)


def logit_of_token(norm, weight, bias=None):
    """A function (x, rms) -> float, the logit of norm(x), for one token x, float32 (C,) on a CPU, rms known.
    With v the norm's weight, w . (v * x / rms) = (w * v) . x / rms: norm(x) itself is not computed."""
    folded = (weight * norm.weight.float()).flatten().detach()
    return functools.partial(folded_logit, folded, 0.0 if bias is None else bias.item())


def folded_logit(folded, offset, x, rms):
    return folded.dot(x).item() / rms + offset
