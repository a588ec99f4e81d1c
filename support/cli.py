"""The command line: flags that all scripts have, what values they take, and where files may be written."""
import argparse
import errno
import math
import os
import sys
import tempfile

import torch

from support.files import InputError
from support.parallel import say_once, take_card


class Parser(argparse.ArgumentParser):
    """Refuses in one sentence, and what is not UTF-8, and what is empty, but for a prompt."""

    def parse_args(self):
        for word in sys.argv[1:]:
            if word.encode(errors="replace").decode() != word:
                self.error(f"{word!r} is not UTF-8 text; give another name or prompt")
        args = super().parse_args()
        for name, value in vars(args).items():
            is_empty = "" in value if isinstance(value, list) else value == ""
            if is_empty and name != "prompt":
                self.error(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
        return args

    def error(self, message):
        self.exit(2, say_once(f"{self.prog}: {message}\n"))


def common_arguments(description):
    """A parser with the flags that every script has."""
    parser = Parser(description=description.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m",
                        help="smollm2-135m, a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="auto: bfloat16 where the hardware has it, but float32 for --train all, and in"
                             " eval.py on a CPU")
    parser.add_argument("--seed", type=number(int, -2**63, 2**63 - 1), default=0)
    return parser


def device_and_dtype(device="auto", dtype="auto"):
    """(torch.device, torch.dtype); auto is CUDA where there is one, and bfloat16 where it is native."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    if device == "cuda":
        take_card()
    if dtype == "auto":
        native = torch.cpu._is_avx512_bf16_supported()
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if native else "float32"
    return torch.device(device), getattr(torch, dtype)


def number(kind, low, high=10**9):
    """An argparse type: an int or a float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            whole = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r}: give a {whole} from {low} to {high}")
        return value
    return parse


def numbers(kind, low, high=10**9):
    """An argparse type: numbers separated by commas, each from low to high."""
    one = number(kind, low, high)
    return lambda text: [one(part) for part in text.split(",")]


def words(known):
    """An argparse type: words separated by commas, each of a known list."""
    def parse(text):
        chosen = text.split(",")
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {', '.join(known)}")
        return chosen
    return parse


def parse_layers(spec, n_layer):
    """The layers that "all", "last:16", "2-29", "3,5,9" or "0,4-7" name, sorted. InputError if none."""
    spans = []
    try:
        for part in str(spec).split(","):
            first, _, last = part.partition("-")
            if part == "all":
                first, last = 0, n_layer - 1
            elif part.startswith("last:"):
                first, last = n_layer - int(part[5:]), n_layer - 1
            spans.append((int(first), int(last or first)))
    except ValueError:
        raise InputError(f"layers {spec!r}: write all, last:16, 2-29 or 3,5,9") from None
    layers = set()
    if all(0 <= end < n_layer for span in spans for end in span):
        layers = {i for first, last in spans for i in range(first, last + 1)}
    if not layers:
        raise InputError(f"layers {spec!r}: this model has layers 0 to {n_layer - 1}; name at least one of"
                         " them, and no other")
    return sorted(layers)


def check_destinations(*paths):
    """InputError, before the work, for a file that could not be written after it. None: no file."""
    for path in paths:
        if path is not None:
            try:
                try_to_write(os.path.realpath(path))
            except OSError as e:
                raise InputError(f"{path}: cannot be written ({e.strerror}); name another place") from None


def try_to_write(path):
    """Nothing, or the OSError that weights.write_file would meet; leaves nothing behind."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):                      # a device or a pipe
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        return
    longest = max(len(os.fsencode(part)) for part in path.split(os.sep))
    if longest > 240 or len(path) > 4000:                                      # with room for ".PID.tmp"
        raise OSError(errno.ENAMETOOLONG, "the name is too long")
    folder = os.path.dirname(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def perplexity(loss):
    """exp(loss), as text of at most 12 characters."""
    return f"{math.exp(loss):.3f}" if loss < 18 else f"10^{loss / math.log(10):.1f}"
