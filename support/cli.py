"""What all scripts have in common: flags, the device, and how they end."""
import argparse
import ctypes
import os
import sys

import torch

from weights import InputError


def common_arguments(description):
    """A parser with the flags that every script has."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m",
                        help="smollm2-135m, a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="auto: bfloat16 where the hardware has it")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype); auto is CUDA where there is one, and bfloat16 where it is native."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if dtype == "auto":
        native = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        dtype = "bfloat16" if native else "float32"
    return torch.device(device), getattr(torch, dtype)


def check_at_least(args, **least):
    """InputError for a flag whose number is below its least; None, not given, passes."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise InputError(f"--{name.replace('_', '-')} should be at least {low}; it is {value}")


def numbers(kind, low, high=float("inf")):
    """An argparse type: numbers separated by commas, each from low to high."""
    def parse(text):
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers, separated by commas") from None
        if not all(low <= value <= high for value in values):
            raise argparse.ArgumentTypeError(f"{text!r}: give numbers from {low} to {high}")
        return values
    return parse


def words(known):
    """An argparse type: words separated by commas, each of a known list."""
    def parse(text):
        chosen = text.split(",") if text else []
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {', '.join(known)}")
        return chosen
    return parse


def parse_layers(spec, n_layer):
    """The layers that "all", "last:16", "2-29", "3,5,9" or "0,4-7" name, sorted. InputError if none."""
    layers = set()
    try:
        for part in str(spec).split(","):
            if part == "all":
                layers |= set(range(n_layer))
            elif part.startswith("last:"):
                layers |= set(range(n_layer - int(part[5:]), n_layer))
            else:
                first, _, last = part.partition("-")
                layers |= set(range(int(first), int(last or first) + 1))
    except ValueError:
        raise InputError(f"layers {spec!r}: write all, last:16, 2-29 or 3,5,9") from None
    if not layers or min(layers) < 0 or max(layers) >= n_layer:
        raise InputError(f"layers {spec!r}: this model has layers 0 to {n_layer - 1}; name at least one of"
                         " them, and no other")
    return sorted(layers)


def keep_freed_memory():
    """Have glibc keep what is freed for what is allocated next. By default every layer's large tensors go
    back to the system and return as pages to be zeroed: a sixth of a prefill's time on a CPU, a tenth of
    tuning's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30)                                               # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)                                           # M_TRIM_THRESHOLD


def run_script(name, main):
    """main(), with bad input told in one sentence and exit status 1, and Ctrl-C without a traceback. What the
    terminal's encoding lacks is printed as ?; a reader that goes away, as `head` does, ends the script."""
    keep_freed_memory()
    for stream in sys.stdout, sys.stderr:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())     # for what Python flushes at exit
    except InputError as e:
        sys.exit(f"{name}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)
