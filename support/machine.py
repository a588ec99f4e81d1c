"""The machine: the device and dtype to run in, and for bench.py its name, its rates, and what a pass asks of
it."""
import platform
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.files import InputError
from support.kernels import FEW, NATIVE_BFLOAT16
from support.parallel import take_card


def device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype); auto is CUDA where there is one, and bfloat16 where it is native."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if device == "cuda":
        take_card()
    if dtype == "auto":
        native = NATIVE_BFLOAT16
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    return torch.device(device), getattr(torch, dtype)


class Work(TorchDispatchMode):
    """Counts what the matrix products inside it do: operations, and the bytes of weights, keys and values."""

    def __init__(self):
        super().__init__()
        self.flops = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm", "addmm", "_linear_pointwise"):
            a, b = args[:2] if name == "_linear_pointwise" else args[-2:]
            self.flops += 2 * out.numel() * a.shape[-1]
            self.bytes += (a if b.shape[-1] <= FEW else b).nbytes      # product_of_few has it on the left
        elif "scaled_dot_product" in name:
            is_backward = "backward" in name
            q, k, v = args[1:4] if is_backward else args[:3]         # before them the gradient of the output
            products = 5 if is_backward else 2                       # backward computes the scores again
            causal = 2 if q.shape[2] == k.shape[2] else 1
            self.flops += 2 * products * q.numel() * k.shape[2] // causal
            self.bytes += k.nbytes + v.nbytes
        return out


def rates(device, dtype):
    """(bytes a second that a large copy reads and writes, or a large sum reads, the higher of the two;
    operations a second of a large product)."""
    cuda = device.type == "cuda"
    repeats = 5 if cuda else 1               # so that launching and waiting do not count

    def best(work, amount, seconds=0.7):
        took, stop = [], time.perf_counter() + seconds
        while not took or time.perf_counter() < stop:
            start = time.perf_counter()
            for _ in range(repeats):
                work()
            if cuda:
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        return repeats * amount / min(took)
    n, n_big = (8192, 2**28) if cuda else (1536, 2**26)
    a, big = torch.randn(n, n, device=device, dtype=dtype), torch.ones(n_big, device=device)
    other = torch.ones_like(big)             # written, since pages that were never touched are not mapped yet
    copied, summed = best(lambda: other.copy_(big), 2 * big.nbytes), best(big.sum, big.nbytes)
    return max(copied, summed), best(lambda: a @ a, 2 * n**3)


def device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    if platform.system() == "Linux":
        with open("/proc/cpuinfo") as f:
            return next((line.split(":")[1].strip() for line in f if line.startswith("model name")),
                        platform.machine())
    return platform.machine()
