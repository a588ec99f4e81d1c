"""Where Triton's kernels run instead of PyTorch's, and copies between host and device that do not wait.

A function that has a kernel in support/triton_kernels.py is decorated `fused`, or asks `triton_kernels(x)`.
"""
import functools
import os
import sys
import threading
from contextlib import contextmanager

import torch

from support.files import reason


class Choices(threading.local):
    """See plain_kernels and only_for; of each thread its own."""
    triton, gate = True, (None, {})


choices = Choices()


@functools.cache
def triton_module():
    """support/triton_kernels.py, or None where Triton does not work: PyTorch's builds for CPUs and for
    Windows come without it, and it needs a C compiler and a folder to write to."""
    try:
        import triton

        from support import triton_kernels
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return triton_kernels
    try:
        triton.runtime.driver.active.get_current_target()        # compiles a first piece of C
    except Exception as e:                                       # whatever a compiler may run into
        print(f"Triton does not work here ({reason(e)}); PyTorch's own kernels are slower", file=sys.stderr)
        return None
    return triton_kernels


def triton_kernels(x):
    """The module of Triton kernels where they serve: on CUDA's current device, where no gradient is asked for
    and float32 is exact enough, without autocast, which they would not hear of; else None."""
    if not x.is_cuda or not choices.triton or torch.is_grad_enabled() or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled("cuda"):
        return None
    return triton_module() if x.get_device() == torch.cuda.current_device() else None


def fused(plain):
    """Let a function run as the Triton kernel of its name where that serves; all arguments by position."""
    @functools.wraps(plain)
    def function(x, *args):
        kernels = triton_kernels(x)
        return getattr(kernels, plain.__name__)(x, *args) if kernels else plain(x, *args)
    return function


@contextmanager
def choose(name, value):
    outer = getattr(choices, name)
    setattr(choices, name, value)
    try:
        yield
    finally:
        setattr(choices, name, outer)


def is_asynchronous(t):
    """Whether what computes t runs on while the host goes on."""
    return t.is_cuda


def to_host(t):
    """A function that gives t on the host. The copy begins now: what is launched until it is called overlaps
    the wait for the device."""
    if t.device.type == "cpu":
        return lambda: t
    copy, is_there = t.to("cpu", non_blocking=True), torch.cuda.Event()
    is_there.record(torch.cuda.current_stream(t.device))

    def wait():
        is_there.synchronize()
        return copy
    return wait


def to_device(t, device):
    """t on a device, without a wait for it where t is on the host."""
    if t.device.type == "cpu" and torch.device(device).type != "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def plain_kernels():
    """Within it no Triton kernel runs and no graph is replayed: for what watches PyTorch's own calls."""
    return choose("triton", False)


def only_for(is_open, n_gated=None):
    """Within it products of one token, and attention of one token per row, may leave out rows whose gate is
    closed: is_open (B,) bool, on the device. What they return of those rows must not be used. Of a Linear in
    n_gated, {Linear: n}, only the first n outputs; the others are computed all the same. (Of several rows all
    products are: they read their weights for one row as for all.)"""
    return choose("gate", (is_open, n_gated or {}))
