"""A fork in one file: gates at sequence level that read the last token of the prompt instead of its mean.

    python examples/last_token.py train_router --granularity attn_sequence --out out/last
    python examples/last_token.py eval --routers out/last/routers.safetensors
    python examples/last_token.py sample "Why is the sky blue?" --routers out/last/routers.safetensors

A kind of gate is a class and a name in GATES. The router file keeps the name, so that no other script takes
it for another kind: they refuse a file whose gate they do not know. Started through this file, they know it.
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.script import run_script  # isort: skip (must come before torch)

import torch

from router import GATES, LinearRouter
from support.files import InputError


class LastToken(LinearRouter):
    def __init__(self, n_embd, scope, pool="prompt"):
        if scope != "sequence":
            raise InputError("last_token: a gate for sequences; give --granularity attn_sequence or its like")
        super().__init__(n_embd, scope, pool)

    def pooled(self, h, ctx):                              # normalized input (B, T, C) -> what is read (B, C)
        rows = torch.arange(len(h), device=h.device)
        return h[rows, ctx.prompt_lengths - 1].float()


GATES["last_token"] = LastToken

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("train_router", "eval", "sample"):
        sys.exit("last_token.py: say which script to run with this gate: train_router, eval or sample")
    script = sys.argv.pop(1)
    if script == "train_router":
        sys.argv[1:1] = "--gate", "last_token"
    run_script(f"{script}.py", importlib.import_module(script).main)
