"""The command line: flags that all scripts have, and what values flags take."""
import argparse
import math
import os
import sys

from support.files import InputError
from support.parallel import processes, say_once


class Parser(argparse.ArgumentParser):
    """Errors are one sentence. Also refuses text that is not UTF-8, empty values (except a prompt's), and a
    missing router file."""

    def parse_args(self):
        for word in sys.argv[1:]:
            if word.encode(errors="replace").decode() != word:
                self.error(f"{word!r} is not UTF-8 text; give another name or prompt")
        args = super().parse_args()
        for name, value in vars(args).items():
            is_empty = "" in value if isinstance(value, list) else value == ""
            if is_empty and name != "prompt":
                self.error(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
            if name in ("routers", "init") and value and not os.path.exists(value):
                raise InputError(f"{value}: this file is missing; train_router.py writes one")
        return args

    def error(self, message):
        hint = "; see --help, and quote a text of several words" * ("unrecognized" in message)
        self.exit(2, say_once(f"{self.prog}: {message}{hint}\n"))


def destination(path):
    """A flag's path to write to; of --out=~/x the shell leaves the ~."""
    return os.path.expanduser(path)


def common_arguments(description):
    """A parser with the flags that every script has. A script that shares its work has called parallel.start
    before."""
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) != processes.world:
        if os.environ["RANK"] != "0":
            sys.exit(1)
        raise InputError("torchrun started several processes, and this script is for one; use python")
    parser = Parser(description=description.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m",
                        help="smollm2-135m, a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="auto: bfloat16 where the hardware has it, but float32 for --train all, and in"
                             " eval.py on a CPU")
    parser.add_argument("--seed", type=number(int, -2**63, 2**63 - 1), default=0)
    return parser


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
    parse = number(kind, low, high)
    return lambda text: [parse(part) for part in text.split(",")]


def words(known):
    """An argparse type: words separated by commas, each of a known list."""
    def parse(text):
        chosen = text.split(",")
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r}: choose from {', '.join(known)}")
        return chosen
    return parse


def check_reachable(capacity, n_gates, n_layer):
    """InputError for an overall capacity that is below what layers without a gate, which always run, give."""
    n_free = n_layer - n_gates
    if capacity < n_free / n_layer:
        least = math.ceil(1000 * n_free / n_layer) / 1000                    # rounded up, so it is accepted
        raise InputError(f"--capacity {capacity}: {n_free} of {n_layer} layers have no router and always run;"
                         f" give at least {least:.3f}, or more --layers")


def parse_layers(spec, n_layer):
    """The layers that "all", "last:16", "2-29", "3,5,9" or "0,4-7" name, sorted. InputError if none."""
    layers = set()
    try:
        for part in str(spec).split(","):
            first, dash, last = part.partition("-")
            if part == "all":
                first, dash, last = 0, "-", n_layer - 1
            elif part.startswith("last:"):
                first, dash, last = n_layer - int(part[5:]), "-", n_layer - 1
            first, last = int(first), int(last if dash else first)
            if not 0 <= first <= last < n_layer:
                raise ValueError
            layers.update(range(first, last + 1))
    except ValueError:
        raise InputError(f"layers {spec!r}: write all, last:16, 2-29 or 3,5,9, of this model's layers 0 to"
                         f" {n_layer - 1}") from None
    return sorted(layers)
