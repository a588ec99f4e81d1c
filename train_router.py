"""Router tuning: a pretrained Llama is frozen, and only its routers, one linear layer each, are trained.

    python train_router.py                      # smollm2-135m, data/instructions.jsonl
    python train_router.py --recipe paper       # as published
    python train_router.py --data alpaca.jsonl --capacity 0.73 --out out/alpaca
    python train_router.py --resume             # go on where Ctrl-C stopped
    torchrun --nproc-per-node 2 train_router.py             # as --accumulate 2, by two processes

A run reads its data, makes the recipe (recipe.py), tunes (`tune` below; at sequence level, by default,
harm.tune), calibrates the threshold where the recipe says so, and prints a table of held-out samples.

--train says which weights learn. routers: the routers' alone. bias: the routers' biases alone, which closes
the same layers for all text. all: the model's too, as in Mixture of Depths; it is then saved in out/model.
"""
from support.script import run_script  # isort: skip (must come before torch)

import json
import math
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

import harm
import losses
from calibration import calibrate, calibration_sources, later_steps
from model import Llama
from recipe import RECIPES, Penalty, check_flags, choose_recipe, excess_penalty, make_source, own_text
from router import (
    GATES,
    GRANULARITIES,
    add_routers,
    capacity,
    load_routers,
    mindskips,
    place,
    remove_routers,
    save_routers,
)
from scoring import evaluate, perplexity
from support import parallel
from support.batches import Batch, hold_out, mixture, pack
from support.cli import check_reachable, common_arguments, destination, number, numbers, parse_layers
from support.data import DEFAULT_DATA, HELD_OUT, PLAIN_PIECE, PLAIN_PROMPT, read_samples
from support.files import InputError
from support.machine import device_and_dtype
from support.memory import tokens_that_fit
from support.own_text import own_text_file
from support.run import Run, check_output, file_hash, settings_of
from tokenizer import Tokenizer


# ------------------------------------------------------------------------------------------------------- loop
def tune(model, source, recipe, capacity_wanted, run, n_kinds=1, teacher=None):
    """Tune by gradient. source: yields each step's [(kind of text, Batch)], see recipe.make_source. Each kind
    has a penalty of its own; a step's penalty is the mean over its batches. run: a Run, which says what steps
    remain and keeps what they give; teacher: see losses.backward."""
    optimizer = make_optimizer(model, recipe)
    penalties = [Penalty(recipe.penalty) for _ in range(n_kinds)]
    if run.checkpoint:
        restore(model, optimizer, penalties, run)
    model.train()
    for step in run.steps():
        batches = next(source)
        target = recipe.target(step, run.n_steps, capacity_wanted)
        per_token = 1 / sum(len(batch.targets) for _, batch in batches)
        for skip in mindskips(model).values():
            skip.estimator = recipe.gate_estimator(step, run.n_steps)

        loss = 0.0
        measured = []                                # of each batch: (kind of text, capacity)
        for (kind, batch), is_counted in parallel.share(batches):    # not counted: a filler, of weight 0
            batch_penalty = is_counted * penalties[kind].value / len(batches)
            regularizer = partial(recipe.regularizer, model, batch_penalty, target)
            loss += losses.backward(model, batch, recipe.loss, is_counted * per_token, regularizer, teacher)
            if is_counted:
                measured.append((kind, capacity(model)))
        loss = parallel.summed(float(loss))[0]
        parallel.sum_gradients(trained(model).values())

        run.check_finite(step, loss)
        if recipe.clip:
            torch.nn.utils.clip_grad_norm_(trained(model).values(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step, run.n_steps, group["peak"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lambdas = [penalties[kind].value for kind, _ in batches]     # of this step: before the update
        measured = parallel.gathered(measured)
        for kind, penalty in enumerate(penalties):
            capacities = [c for its_kind, c in measured if its_kind == kind]
            if capacities and recipe.moves_penalty:  # a step need not hold every kind
                penalty.update(fmean(capacities) - target)

        run.log(step, loss=loss, target=target, capacity=fmean(c for _, c in measured),
                **{"lambda": fmean(lambdas), "lr": recipe.learning_rate(step, run.n_steps, recipe.lr)})
        if run.is_due(step):
            run.save(step, tuning_state(model, optimizer, penalties))


def trained(model):
    """{name: parameter} of what trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizer(model, recipe):
    """AdamW on what the recipe trains, which is unfrozen here; each group has its peak learning rate."""
    if recipe.train == "all":
        model.requires_grad_(True)
    if recipe.train == "bias":
        for skip in mindskips(model).values():
            skip.router.requires_grad_(False)
            skip.router.bias.requires_grad_(True)
    groups = {}
    for name, parameter in trained(model).items():
        peak = recipe.lr if ".router." in name else recipe.model_lr
        if recipe.bias_lr and name.endswith("router.bias"):
            peak = recipe.bias_lr
        groups.setdefault(peak, []).append(parameter)
    groups = [{"params": parameters, "peak": peak} for peak, parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=recipe.betas, weight_decay=0.0)


# ------------------------------------------------------------------------------------------------- checkpoint
def tuning_state(model, optimizer, penalties):
    """{name: tensor} to continue from: what trains, AdamW's moments, the penalties, a gate's buffers."""
    values = [[penalty.level, penalty.value] for penalty in penalties]
    tensors = {"penalties": torch.tensor(values, dtype=torch.float64)}
    tensors |= {name: buffer.float() for name, buffer in model.named_buffers()}
    for name, parameter in trained(model).items():
        state = optimizer.state[parameter]
        tensors |= {name: parameter.detach(), f"{name}.m": state["exp_avg"], f"{name}.v": state["exp_avg_sq"]}
    return tensors


def restore(model, optimizer, penalties, run):
    """The inverse of tuning_state."""
    for penalty, (level, value) in zip(penalties, run.tensor("penalties", (len(penalties), 2)).tolist()):
        penalty.level, penalty.value = level, value
    for name, buffer in model.named_buffers():
        buffer.copy_(run.tensor(name, buffer.shape))
    for name, parameter in trained(model).items():
        value, m, v = (run.tensor(key, parameter.shape) for key in (name, f"{name}.m", f"{name}.v"))
        parameter.data.copy_(value)
        optimizer.state[parameter] = {"exp_avg": m.to(parameter.device), "exp_avg_sq": v.to(parameter.device),
                                      "step": torch.tensor(float(run.start))}


# ----------------------------------------------------------------------------------------------------- script
def parse_arguments():
    p = common_arguments(__doc__)
    count, rate = number(int, 1), number(float, 0, 1e6)
    p.add_argument("--data", nargs="+", default=[str(DEFAULT_DATA)], metavar="FILE",
                   help="Alpaca JSON or JSONL, chat JSONL or plain text; several are mixed")
    p.add_argument("--data-weights", type=numbers(float, 1e-6), metavar="W,W",
                   help="shares of several --data (default: each sample once)")
    p.add_argument("--piece", type=number(int, PLAIN_PROMPT + 1), help="tokens per piece of text, best as"
                   f" many as will be read (default: {PLAIN_PIECE}; what the model writes: each text)")
    p.add_argument("--init", metavar="FILE", help="begin with the routers of this file")
    p.add_argument("--granularity", default="attn_token", choices=GRANULARITIES)
    p.add_argument("--layers", default="all", help="which layers get a router: all, last:16, 2-29 or 3,5,9")
    p.add_argument("--capacity", type=number(float, 0.001, 1), default=0.8,
                   help="overall: the share of sublayers that run")
    p.add_argument("--out", type=destination, default="out", help="folder of the routers, metrics.jsonl and"
                   " the checkpoint; a finished run there is replaced, one that is not is kept")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--tokens", type=count, help="tokens per batch (default: the recipe's, or what fits)")
    p.add_argument("--accumulate", type=count, default=1, help="batches per step and process; not for paper")
    p.add_argument("--shard", action="store_true", help="torchrun: each holds a part of the frozen weights")
    p.add_argument("--held-out", type=count, default=HELD_OUT, help="last samples of --data, for the table")
    p.add_argument("--save-every", type=count, default=20, help="steps between checkpoints")
    p.add_argument("--recipe", default="default", choices=RECIPES, help="the flags below replace its values")
    p.add_argument("--gate", choices=GATES, help="kind of gate")
    p.add_argument("--loss", choices=losses.LOSSES, help="KL from the dense model, or cross-entropy")
    p.add_argument("--train", choices=("routers", "bias", "all"), help="which weights learn")
    p.add_argument("--method", choices=("ramp", "straight-through", "harm"),
                   help="gradient of the gates: a ramp's or the score's; or harm: regression, no gradient")
    p.add_argument("--steps", type=count)
    p.add_argument("--epochs", type=count, help="passes over the data (--recipe paper, instead of --steps)")
    p.add_argument("--max-samples", type=count, help="samples to tune on, of all --data mixed (default: all)")
    p.add_argument("--clip", type=rate, help="norm that gradients are clipped to; 0: not at all")
    p.add_argument("--lr", type=rate, help="peak rate of the routers (at sequence level, of their weights)")
    p.add_argument("--model-lr", type=rate, help="peak rate of the model's weights, with --train all")
    p.add_argument("--penalty", type=rate, help="lambda, the penalty on capacity, to begin with")
    p.add_argument("--pool", choices=("prompt", "all"), help="what the gate of a sequence reads")
    p.add_argument("--kv", choices=("all", "open"), help="which tokens have keys and values, at token level")
    args = p.parse_args()
    if args.train == "all" and args.dtype == "auto":
        args.dtype = "float32"                       # steps of 1e-5 would be lost in bfloat16's rounding
    if args.data_weights and len(args.data_weights) != len(args.data):
        raise InputError(f"--data-weights: give one for each --data, {len(args.data)}, not"
                         f" {len(args.data_weights)}")
    if args.shard and args.train == "all":
        raise InputError("--shard: only frozen weights are held in parts; leave out --train all, or --shard")
    if args.shard and parallel.processes.world == 1:
        raise InputError("--shard: there is one process, which holds all; start several, with torchrun"
                         " --nproc-per-node N, or leave it out")
    args.command = shlex.join(word for word in ["python", *sys.orig_argv[1:]] if word != "--resume")
    return args


def make_recipe(args, samples, model):
    """The Recipe of the flags; its values, and what follows from them, are written into args. Refuses what
    does not go together."""
    keys = "gate loss train method lr model_lr penalty pool kv steps epochs clip".split()
    recipe = choose_recipe(args.recipe, args.granularity, **{key: getattr(args, key) for key in keys})
    check_capacity(args, recipe, model.config.n_layer)
    check_flags(args, recipe, model.config.n_embd)
    if args.init:
        recipe = replace(recipe, falls_until=0.0)                # its routers have closed gates already
    if not recipe.step_samples:
        args.accumulate *= parallel.processes.world              # from here on: over all processes
    for key in keys:
        setattr(args, key, getattr(recipe, key))
    args.steps = recipe.steps or recipe.epochs * math.ceil(len(samples) / recipe.step_samples)
    all_train = recipe.train == "all"
    first_trained = 0 if all_train else min(parse_layers(args.layers, model.config.n_layer))
    most = recipe.tokens_cuda if model.embed.weight.is_cuda else recipe.tokens_cpu
    masked = max(args.piece or PLAIN_PIECE, *(len(s.ids) for s in samples)) if recipe.kv == "open" else 0
    fitting = tokens_that_fit(model, first_trained, most, losses.CHUNK["cuda"], all_train, masked)
    args.tokens = args.tokens or min(parallel.gathered([fitting]))
    return recipe


def check_capacity(args, recipe, n_layer):
    """Refuse, before the tuning, a capacity that the recipe aims at but cannot have."""
    penalizes_excess = recipe.penalty and recipe.regularizer is excess_penalty
    has_target = recipe.method == "harm" or recipe.calibrates or recipe.moves_penalty or penalizes_excess
    if has_target:
        check_reachable(args.capacity, len(parse_layers(args.layers, n_layer)), n_layer)


def read_data(args, tok, context):
    """(samples to tune on, held-out samples): of each --data file the last ones are held out."""
    train_sets, test_set = [], []
    for path in args.data:
        samples, n_cut = read_samples(path, tok, context, args.piece or PLAIN_PIECE)
        if n_cut:
            print(f"{n_cut} samples were cut to the context of {context} tokens", file=sys.stderr)
        train_part, test_part = hold_out(samples, max(1, args.held_out // len(args.data)), path)
        train_sets.append(train_part)
        test_set += test_part
    return mixture(train_sets, args.data_weights, args.seed)[:args.max_samples], test_set


def place_routers(model, recipe, args):
    """New routers, or with --init those of a file, which have to be of the kind that the run has."""
    if not args.init:
        torch.manual_seed(args.seed)                 # for gates whose weights are random at first
        add_routers(model, args.granularity, args.layers, pool=recipe.pool, gate=recipe.gate, kv=recipe.kv)
        return
    meta = load_routers(model, args.init)
    layers = parse_layers(args.layers, model.config.n_layer)
    wanted = {"granularity": args.granularity, "layers": ",".join(map(str, layers)), "gate": recipe.gate,
              "kv": recipe.kv}
    if args.granularity.endswith("sequence"):
        wanted["pool"] = recipe.pool
    for what, value in wanted.items():
        if meta[what] != value:
            raise InputError(f"--init {args.init}: its routers have {what} {meta[what]}, this run {value};"
                             f" give --{what} {meta[what]}, or another file")


def report(result, recipe, args):
    """The final table."""
    print(f"\nrecipe {recipe.name}, held out: {result['tokens']:,} answer tokens")
    print(f"{'':8}{'loss':>8}{'perplexity':>12}{'KL to dense':>13}{'capacity overall':>18}{'routed':>8}"
          f"{'of answers':>12}")
    dense_row = {"loss": result["dense_loss"], "kl": 0.0, "capacity": 1.0, "routed_capacity": 1.0,
                 "answer_capacity": 1.0}
    for name, row in ("dense", dense_row), ("routed", result):
        print(f"{name:8}{row['loss']:8.4f}{perplexity(row['loss']):>12}{row['kl']:13.4f}"
              f"{row['capacity']:18.3f}{row['routed_capacity']:8.3f}{row['answer_capacity']:12.3f}")
    if recipe.calibrates and abs(result["capacity"] - args.capacity) > 0.02:
        print(f"--capacity {args.capacity} was calibrated on training text and text that the model wrote")
    print(f"\nhow often each layer's {args.granularity.split('_')[0]} ran")
    for layer, share in result["keep"].items():
        print(f"{layer:4d} {'█' * round(40 * share):40} {share:.3f}")
    print(f"\n{Path(args.out) / 'routers.safetensors'}")
    if recipe.train == "all":
        print(f"{Path(args.out) / 'model'}: the model they were trained with")


def main():
    parallel.start()
    args = parse_arguments()
    check_output(args.model, args.out, args.init)
    device, dtype = device_and_dtype(args.device, args.dtype)
    tok = Tokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, "cpu" if args.shard else device, dtype)
    for module in model.embed, model.norm, model.head:         # with --shard the layers follow, in parts
        module.to(device)
    train_set, test_set = read_data(args, tok, model.config.max_context)
    recipe = make_recipe(args, train_set, model)
    save = partial(save_routers, model, Path(args.out) / "routers.safetensors", command=args.command)
    settings = settings_of(args, model, train_set + test_set)
    settings["--init of hash"] = file_hash(args.init) if args.init else "none"
    parallel.check_enough(len(train_set), " ".join(args.data), "samples to tune on")
    parallel.check_same(settings)
    place_routers(model, recipe, args)
    run = Run(args, settings, save)
    text_path = own_text_file(args.model, args.seed, settings["weights of hash"])
    if args.shard:
        parallel.shard(model)
    own_ids, own_samples = own_text(model, recipe, train_set, args.seed, text_path, run, args.piece)
    teacher = None
    if recipe.train == "all":
        teacher = Llama.from_pretrained(args.model, device, dtype).requires_grad_(False)

    by_kind = [train_set] if own_samples is None else [train_set, own_samples]
    source = make_source(recipe, by_kind, args, device)
    for _ in range(run.start):                       # skip the data of the steps that are done
        next(source)
    step_tokens = args.accumulate * args.tokens
    if recipe.step_samples:
        step_tokens = recipe.step_samples * sum(len(s.ids) for s in train_set) / len(train_set)
    sources = calibration_sources(model, train_set, own_ids, 2 * args.tokens) if recipe.calibrates else ()
    run.later_steps = later_steps(model, recipe, sources, test_set, step_tokens)
    if recipe.method == "harm":
        harm.tune(model, source, recipe, args.capacity, run)
    else:
        tune(model, source, recipe, args.capacity, run, len(by_kind), teacher)

    calibration = []
    with run.tuned():
        if recipe.calibrates:
            calibration = calibrate(model, sources, args.capacity)
        batches = (Batch.of(group, device) for group in pack(test_set, 2 * args.tokens))
        result = evaluate(model, batches, teacher)
    run.check_finite(run.n_steps, result["loss"] + result["kl"])
    if not parallel.is_first():
        return
    if recipe.train == "all":           # the model first: a router file with results marks a finished run
        skips = mindskips(model)
        remove_routers(model)
        model.save_pretrained(Path(args.out) / "model", args.model)
        for layer, skip in skips.items():
            place(model, layer, skip.part, skip)
    save(calibration, held_out=json.dumps(result))
    report(result, recipe, args)


if __name__ == "__main__":
    run_script("train_router.py", main)
