"""LoRA beside routers: low-rank updates of the frozen weights (arXiv 2106.09685), trained with fixed routers.

    python examples/lora.py --routers out/routers.safetensors --data alpaca.jsonl --out out/lora

W becomes W + alpha / rank * B A in every linear layer of the blocks (queries, keys and values are one here,
and share A, as gate and up do); the loss is the cross-entropy of answers. It runs twice, with the same
batches: on the dense model and on the routed one, whose routers are tuned before (both at once are unstable:
the paper reports an average of 48.2 for Llama-2-7B). Out come out/lora/dense and out/lora/routed, Hugging
Face folders with B A added to the weights; the latter with its router file:

    python eval.py --model out/lora/routed --routers out/lora/routed/routers.safetensors
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.script import run_script  # isort: skip (must come before torch)

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

import losses
from model import Config, Llama
from router import load_routers, mindskips, remove_routers, save_routers
from scoring import evaluate, perplexity
from support.batches import Batch, batches, hold_out, pack
from support.cli import common_arguments, destination, number
from support.data import DEFAULT_DATA, HELD_OUT, read_samples
from support.files import InputError
from support.kernels import Linear
from support.machine import device_and_dtype
from support.run import check_output
from tokenizer import Tokenizer
from weights import open_checkpoint


class LowRank(nn.Module):
    """W (out, in) -> W + scale * B A; B is 0 at first."""

    def __init__(self, weight, rank, scale):
        super().__init__()
        n_out, n_in = weight.shape
        self.A = nn.Parameter(torch.randn(rank, n_in, device=weight.device) / n_in ** 0.5)
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=weight.device))
        self.scale = scale

    def forward(self, weight):
        return weight + (self.scale * self.B @ self.A).to(weight.dtype)


def linear_layers(model):
    """[every linear layer of the blocks], but for routers, which are nn.Linear."""
    return [module for module in model.layers.modules() if isinstance(module, Linear)]


def check_rank(config, rank):
    narrowest = min(config.n_embd, config.n_head * config.head_dim, config.intermediate)
    if not 1 <= rank <= narrowest:
        raise InputError(f"--rank {rank}: should be from 1 to {narrowest}, the width of the narrowest layer")


def add_lora(model, rank, alpha):
    """From then on only A and B train; the gates decide as before, and have no gradient."""
    model.requires_grad_(False)
    for linear in linear_layers(model):
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight, rank, alpha / rank))
    for skip in mindskips(model).values():
        skip.estimator = lambda score, threshold: (score >= threshold).to(score.dtype)


def merge(model):
    """Add B A to the weights, for good."""
    for linear in linear_layers(model):
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)


def tune(model, samples, args, name):
    """A batch per step; the loss is the cross-entropy of the answers' tokens."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    source = batches(samples, args.tokens, args.seed)
    bar = tqdm(range(args.steps), desc=name, unit="step")
    for step in bar:
        batch = Batch.of(next(source), model.embed.weight.device)
        model.train()
        loss = losses.backward(model, batch, "ce", 1 / len(batch.targets))
        if not torch.isfinite(loss):
            raise InputError(f"{name}: the loss at step {step + 1} is {float(loss)}; lower --lr")
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{float(loss):.3f}")


def parse_arguments():
    p, count = common_arguments(__doc__), number(int, 1)
    p.add_argument("--routers", required=True, help="a file that train_router.py wrote")
    p.add_argument("--data", default=str(DEFAULT_DATA), help="as for train_router.py")
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=number(float, 0, 1e6), default=16.0)
    p.add_argument("--lr", type=number(float, 0, 1e6), default=5e-4, help="at first; it falls to 0")
    p.add_argument("--steps", type=count, default=60)
    p.add_argument("--tokens", type=count, default=2048, help="per step")
    p.add_argument("--held-out", type=count, default=HELD_OUT, help="last samples of --data, for the table")
    p.add_argument("--out", type=destination, default="out/lora")
    p.set_defaults(dtype="float32")                  # small updates would be lost in bfloat16's rounding
    return p.parse_args()


def main():
    args = parse_arguments()
    for name in "dense", "routed":
        check_output(args.model, Path(args.out) / name, args.routers)
    device, dtype = device_and_dtype(args.device, args.dtype)
    checkpoint = open_checkpoint(args.model)
    config = Config.from_hf(checkpoint.config, checkpoint.path)
    check_rank(config, args.rank)
    samples, _ = read_samples(args.data, Tokenizer.from_pretrained(args.model), config.max_context)
    train_set, test_set = hold_out(samples, args.held_out, args.data)
    test = [Batch.of(group, device) for group in pack(test_set, args.tokens)]
    rows = {}
    for name in "routed", "dense":                   # in this order, since a router file may be refused
        model = Llama.from_pretrained(args.model, device, dtype).requires_grad_(False)
        if name == "routed":
            load_routers(model, args.routers)
        rows[name] = evaluate(model, test)
        torch.manual_seed(args.seed)                 # again: creating routers drew random numbers
        add_lora(model, args.rank, args.alpha)
        tune(model, train_set, args, f"{name} + LoRA")
        merge(model)
        rows[f"{name} + LoRA"] = evaluate(model, test)
        folder = Path(args.out) / name
        if name == "routed":
            save_routers(model, folder / "routers.safetensors")
        remove_routers(model)
        model.save_pretrained(folder, args.model)
    print(f"\n{'':14}{'loss':>8}{'perplexity':>12}{'capacity':>10}")
    for name in "dense", "dense + LoRA", "routed", "routed + LoRA":
        row = rows[name]
        print(f"{name:14}{row['loss']:8.4f}{perplexity(row['loss']):>12}{row['capacity']:10.3f}")


if __name__ == "__main__":
    run_script("lora.py", main)
