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
    """Per thread: triton, whether Triton kernels run (plain_kernels); gate, what only_for was called with."""
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
    """The module of Triton kernels where they can run: x on CUDA's current device, not float64, no gradient
    needed, and no autocast, whose casts Triton kernels would bypass. Else None."""
    if not x.is_cuda or not choices.triton or torch.is_grad_enabled() or x.dtype == torch.float64:
        return None
    if torch.is_autocast_enabled("cuda"):
        return None
    return triton_module() if x.get_device() == torch.cuda.current_device() else None


def fused(plain):
    """Decorator: run the function of this name in triton_kernels.py where it can. Positional arguments."""
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
    """Whether operations on t run asynchronously to the host: on CUDA."""
    return t.is_cuda


def to_host(t):
    """A function that returns t on the host. The copy starts now, and the call waits for its end: what is
    launched in between overlaps the copy."""
    if t.device.type == "cpu":
        return lambda: t
    copy, copied = t.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record(torch.cuda.current_stream(t.device))

    def wait():
        copied.synchronize()
        return copy
    return wait


def to_device(t, device):
    """t on a device; from the host without a device sync."""
    if t.device.type == "cpu" and torch.device(device).type != "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def plain_kernels():
    """Context manager: no Triton kernel runs and no graph is replayed, for what watches PyTorch's calls."""
    return choose("triton", False)


def only_for(is_open, n_gated=None):
    """Context manager: with one token per row, attention skips rows whose gate is closed, is_open (B,) bool
    on the device. With B = 1 matmuls skip their weights, too (for several rows these are read once anyway).
    Results of closed rows must not be used. n_gated {Linear: n}: only its first n outputs obey the gate; the
    others are always computed."""
    return choose("gate", (is_open, n_gated or {}))
