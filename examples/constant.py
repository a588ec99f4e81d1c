"""What a closed token gets instead of nothing, in its simplest form: a constant, learned beside the router.

    y = x + g f(h) + (1 - g) c          c: C numbers per layer, 0 at first

    python examples/constant.py train_router --out out/constant
    python examples/constant.py eval --routers out/constant/routers.safetensors --static 4,6,8
    python examples/constant.py sample "Why is the sky blue?" --routers out/constant/routers.safetensors

An attention adds much that is the same for every token: a head that finds nothing to read attends to the
first one. To be fair, eval here gives a static drop a constant too: an attention that --static removes is
replaced by the mean of what it adds in the dense model, on the first texts of --static-data.
"""
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.script import run_script  # isort: skip (must come before torch)

import torch
from torch import nn

import eval as eval_script
from model import run_layers
from router import GATES, LinearRouter, add_routers, close_all, mindskips, remove_routers
from support.data import read_samples

SCRIPTS = "train_router", "eval", "bench", "sample"
MEAN_TEXTS = 48                     # that the means are taken over


class Constant(LinearRouter):
    def __init__(self, n_embd, scope, pool="prompt"):
        super().__init__(n_embd, scope, pool)
        self.constant = nn.Parameter(torch.zeros(n_embd))

    def replacement(self, x):                                            # (..., C)
        return x + self.constant.to(x.dtype)


GATES["constant"] = Constant


@torch.no_grad()
def mean_updates(model, samples):
    """[the mean over all tokens of what each layer's attention adds, float32 (C,)], in the dense model."""
    remove_routers(model)
    sums, n_tokens = [0.0] * len(model.layers), 0

    def add(layer, attn, inputs, y):                                     # called after each attention
        sums[layer] += (y - inputs[0]).float().sum((0, 1))
    hooks = [layer.attn.register_forward_hook(partial(add, i)) for i, layer in enumerate(model.layers)]
    for sample in samples:
        idx = torch.tensor([sample.ids], device=model.embed.weight.device)
        run_layers(model.layers, model.embed(idx), model.context(idx))
        n_tokens += len(sample.ids)
    for hook in hooks:
        hook.remove()
    return [total / n_tokens for total in sums]


def with_means(make_variants, model, tok, args):
    """eval.py's variants, of which the static ones leave the mean of what each attention adds."""
    setters = make_variants(model, tok, args)
    if not args.static:
        return setters
    print("static: with the mean of what each of these attentions adds")
    context = min(eval_script.STATIC_TOKENS, model.config.max_context)
    samples, _ = read_samples(args.static_data, tok, context)
    means = mean_updates(model, samples[:MEAN_TEXTS])

    def static(remove):
        remove()
        layers = ",".join(map(str, mindskips(model)))
        add_routers(model, "attn_token", layers, gate="constant")
        for layer, skip in mindskips(model).items():
            skip.override = close_all
            skip.router.constant.data.copy_(means[layer])
    return {name: partial(static, set_up) if name.startswith("static") else set_up
            for name, set_up in setters.items()}


def main():
    if len(sys.argv) < 2 or sys.argv[1] not in SCRIPTS:
        sys.exit(f"constant.py: say which script to run with this gate: {', '.join(SCRIPTS)}")
    script = sys.argv.pop(1)
    if script == "train_router":
        sys.argv[1:1] = "--gate", "constant"
    eval_script.make_variants = partial(with_means, eval_script.make_variants)
    run_script(f"{script}.py", importlib.import_module(script).main)


if __name__ == "__main__":
    main()
