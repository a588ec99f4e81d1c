"""FlexiDepth (arXiv 2503.23798) in one file: a router with a bottleneck, a gated update, an adapter for
closed tokens, a price on the square of the layers that a token uses; as kinds of gate and a recipe.

    h = norm1(x)    s = sigmoid(W_r W_up norm(tanh(W_down h)))      W_down: C -> C/16, W_up: C/16 -> C
    open, s >= 0.5: y = x + s (block(x) - x)
    closed:         y = x + (1 - s) A(norm2(x))       A: a SwiGLU 16 times narrower; key and value are kept
    loss = cross-entropy + alpha * mean over tokens of (sum over layers of s)^2

    python examples/flexidepth.py --data alpaca.jsonl --out out/flexidepth         # their gates and loss
    python examples/flexidepth.py eval --routers out/flexidepth/routers.safetensors     # or bench, or sample
    python examples/flexidepth.py train_router --gate bottleneck --lr 0.002 --tokens 512    # our recipe

The first takes the flags of train_router.py: --penalty is alpha, from which capacity follows (--capacity is
not used), --loss kl takes our loss, --gate gated goes without the adapter; --gate adapter without the gated
update is for our recipe. Published are the formulas, alpha, the last 16 of 32 layers and three epochs of
939,000 chats; ours are 160 steps, the last 15 of 30 layers (or --layers), a larger learning rate (published:
1e-4) and a good start: W_r = 0, so that new gates are just open, A = 0, and a bias for the bottleneck alone.
"""
import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.script import run_script  # isort: skip (must come before torch)

import torch
import torch.nn.functional as F
from torch import nn

from model import Block, swiglu
from recipe import PAPER, RECIPES, Recipe
from router import GATES, LinearRouter, mindskips
from support.files import InputError
from support.kernels import recomputed

SCRIPTS = "train_router", "eval", "bench", "sample"

# --------------------------------------------------------------------------------------------- kinds of gate
class Bottleneck(LinearRouter):
    """The router alone, in float32; W_r (1, C) is LinearRouter's weight. Published without biases; with one,
    new gates are open as a linear router's are, also where they are ramps in training."""

    def __init__(self, n_embd, scope, pool="prompt", bias=False):
        super().__init__(n_embd, scope, pool, bias)
        narrow = max(1, n_embd // 16)
        self.down = nn.Linear(n_embd, narrow, bias=False)
        self.norm = nn.RMSNorm(narrow, eps=1e-6)
        self.up = nn.Linear(narrow, n_embd, bias=False)

    def forward(self, read):                                             # (..., C) -> (..., 1)
        return recomputed(self.logit, read)

    def logit(self, read):
        narrow = torch.tanh(self.down(read.to(self.weight.dtype)))       # (..., C / 16)
        return F.linear(self.up(self.norm(narrow)), self.weight, self.bias)


class Gated(Bottleneck):
    """With the gated update: an open token gets s times what the sublayer adds, a closed one nothing."""

    def merge(self, skip, x, y, score, is_open):
        return torch.lerp(x, y, (score * is_open)[..., None].to(x.dtype))


class Adapter(Bottleneck):
    """With the adapter A, and MindSkip's gate: x + gate (block(x) - x) + (1 - gate) A(norm2(x))."""

    def attach(self, block):
        if not isinstance(block, Block):
            raise InputError("an adapter stands in for a whole block; give --granularity block_token")
        n_embd, width = block.mlp.gate_up.in_features, max(1, block.mlp.down.in_features // 16)
        self.adapter_in = nn.Linear(n_embd, 2 * width, bias=False)
        self.adapter_out = nn.Linear(width, n_embd, bias=False)
        nn.init.zeros_(self.adapter_out.weight)

    def adapter(self, h):                                                # A: (N, C) -> (N, C)
        gate, up = self.adapter_in(h.to(self.weight.dtype)).chunk(2, -1)
        return self.adapter_out(swiglu(gate, up))

    def shares(self, skip, score, is_open):
        """How much of what the block adds a token gets, and of what the adapter adds, (B, T) each."""
        gate = skip.gates if skip.training else is_open.to(score.dtype)
        return gate, 1 - gate

    def merge(self, skip, x, y, score, is_open):
        of_block, of_adapter = (share.flatten() for share in self.shares(skip, score, is_open))     # (B * T,)
        flat_x = x.flatten(0, 1)
        merged = torch.lerp(flat_x, y.flatten(0, 1), of_block[:, None].to(x.dtype))
        served = torch.ones_like(of_adapter) if skip.training else of_adapter
        at = served.nonzero().squeeze(1)                                 # (N,): in inference closed ones
        update = of_adapter[at, None] * self.adapter(skip.sublayer.mlp.norm(flat_x[at]))
        return merged.index_copy(0, at, merged[at] + update.to(x.dtype)).view_as(x)


class FlexiDepth(Adapter):
    """With both."""

    def shares(self, skip, score, is_open):
        return score * is_open, (1 - score) * ~is_open


GATES |= {"bottleneck": partial(Bottleneck, bias=True), "gated": Gated, "adapter": Adapter,
          "flexidepth": FlexiDepth}


# ------------------------------------------------------------------------------------------------- a recipe
def squared_price(model, alpha, target=None):
    """alpha * the mean over real tokens of (the sum over layers of s)^2."""
    skips = list(mindskips(model).values())
    layers_used = sum(skip.gates for skip in skips)                      # (B, T), 0 at padding
    return alpha * layers_used.square().sum() / skips[0].seen


@dataclass(frozen=True)
class SoftGates(Recipe):
    """The score s itself is priced, not the step g."""

    def __post_init__(self):
        if self.gate not in ("gated", "flexidepth"):
            raise InputError(f"--gate {self.gate}: this recipe trains gates between 0 and 1, which only gated"
                             " and flexidepth have in inference too; name train_router for ours")
        if self.kv == "open":
            raise InputError("--kv open: in training a gate between 0 and 1 hides part of a key, in inference"
                             " all or nothing; leave it out, or name train_router for our recipe")
        if self.method != "straight-through":
            raise InputError(f"--method {self.method}: this recipe's gates are their scores; leave it out, or"
                             " name train_router for our recipe")

    def gate_estimator(self, step, steps):
        return lambda score, threshold: score


RECIPES["flexidepth"] = SoftGates(**vars(PAPER) | dict(
    name="flexidepth", gate="flexidepth", regularizer=squared_price, penalty=1e-3, lr=2e-3, betas=(0.9, 0.95),
    steps=160, step_samples=None))


def main():
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        script = sys.argv.pop(1)
    else:                                        # what the command line says besides comes later, and counts
        script = "train_router"
        sys.argv[1:1] = "--recipe flexidepth --granularity block_token --layers last:15".split()
    run_script(f"{script}.py", importlib.import_module(script).main)


if __name__ == "__main__":
    main()
