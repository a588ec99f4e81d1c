"""Router tuning: a pretrained Llama is frozen, and only its routers, one linear layer each, are trained.

    python train_router.py                      # smollm2-135m, data/instructions.jsonl
    python train_router.py --data alpaca.jsonl --capacity 0.73 --out out/alpaca
    python train_router.py --resume             # go on where Ctrl-C stopped

The loss is that of the answers' tokens: the KL divergence from the dense model's distribution (kl: no
labels, it asks that the model behave as before), or the cross-entropy (ce, the paper's). To it comes a
penalty on capacity above a target, which falls to --capacity over the first half of the run. Tuning starts
from each layer's measured harm (see warm_start). At the end the threshold is moved, from 0.5, until the
capacity is met on training samples. Layers below the first router need no autograd graph, and with kl their
output serves both passes.
"""
import argparse
import json
import math
import signal
import sys
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from model import Llama, pick
from router import (
    CLOSED,
    GRANULARITIES,
    Usage,
    add_routers,
    capacity_loss,
    dense,
    overall,
    parse_layers,
    routers,
    save_routers,
)
from samples import PLAIN_PIECE, PLAIN_PROMPT, Batch, Sample, batches, pack, read_samples
from tokenizer import Tokenizer
from weights import InputError, open_safetensors, write_file

DEFAULT_DATA = Path(__file__).parent / "data" / "instructions.jsonl"
HEAD_CHUNK = 128      # tokens whose logits exist at once
WARM_BATCHES, WARM_TOKENS = 4, 1024
CALIBRATION_SAMPLES = 24
CALIBRATION_LOGITS = -1, -0.5, -0.25, 0, 0.25, 0.5, 1       # of the threshold
HELD_OUT = 64         # samples at the end of --data that are kept for the table


# ------------------------------------------------------------------------------------------------------ loss

def two_passes(model, batch, with_dense):
    """The residual stream where a next token is scored, (N, C): routed, and dense if asked (else None)."""
    first = min(routers(model), default=model.config.n_layer)
    ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
    with torch.no_grad():                                     # below the first router both are the same
        below = model.run(model.embed(batch.idx), ctx, 0, first)
        if with_dense:
            with dense(model):
                reference = model.run(below, ctx, first)[batch.scored]
    return model.run(below, ctx, first)[batch.scored], reference if with_dense else None


def log_probabilities(model, x):
    """Log-probabilities of the next token, float32 (n, V), from the residual stream (n, C)."""
    return model.head(model.norm(x)).float().log_softmax(-1)


def divergence(log_p, log_q):
    """KL(p || q) of each token in nats, (n,)."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def backward(model, batch, kind, weight, target, penalty):
    """Add a batch's gradients to the routers; returns the sum of its tokens' losses times `weight`, a tensor.

    The logits, vocab_size numbers a token, exist for HEAD_CHUNK tokens at a time: the head's gradient is
    gathered chunk by chunk at its input, then sent through the layers in one go, together with that of
    `penalty` times the capacity loss.
    """
    x, reference = two_passes(model, batch, kind == "kl")
    leaf, total = x.detach().requires_grad_(), 0.0
    for i in range(0, len(leaf), HEAD_CHUNK):
        part = slice(i, i + HEAD_CHUNK)
        log_q = log_probabilities(model, leaf[part])
        if kind == "ce":
            losses = F.nll_loss(log_q, batch.targets[part], reduction="none")
        else:
            with torch.no_grad():
                log_p = log_probabilities(model, reference[part])
            losses = divergence(log_p, log_q)
        loss = losses.sum() * weight
        loss.backward()
        total = total + loss.detach()
    torch.autograd.backward([x, penalty * capacity_loss(model, target)], [leaf.grad, None])
    return total


@torch.no_grad()
def evaluate(model, samples, budget, device):
    """Dense and routed loss, KL(dense || routed) in nats a token, and each layer's keep rate, on samples."""
    model.eval()
    sums, tokens, usage = torch.zeros(3, dtype=torch.float64), 0, Usage(model)
    for group in pack(samples, budget):
        batch = Batch.of(group, device)
        x, reference = two_passes(model, batch, with_dense=True)
        for i in range(0, len(x), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            log_p, log_q = log_probabilities(model, reference[part]), log_probabilities(model, x[part])
            ce = [F.nll_loss(log, batch.targets[part], reduction="sum") for log in (log_p, log_q)]
            sums += torch.stack([*ce, divergence(log_p, log_q).sum()]).cpu()
        tokens += len(x)
        usage.add()
    dense_loss, loss, kl = (sums / tokens).tolist()
    return {"tokens": tokens, "dense_loss": dense_loss, "loss": loss, "kl": kl} | usage.summary()


# -------------------------------------------------------------------------------------------------- training

def learning_rate(step, args):
    """Warm-up over the first 5 % of the steps, then a cosine down to a tenth."""
    warm = max(1, args.steps // 20)
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, args.steps - warm)))


def target_capacity(step, args):
    """Falls over the first half of the run from where the routers start to --capacity."""
    start = first_target(args)
    return start + (args.capacity - start) * min(1.0, 2 * (step + 1) / args.steps)


def first_target(args):
    """Where the routers start: open, half-way, so that layers compete before they close, or at --capacity."""
    if args.start == "open":
        return 1
    return (1 + args.capacity) / 2 if args.granularity.endswith("token") else args.capacity


@torch.no_grad()
def measure_harm(model, groups, device):
    """How far the output moves when one layer is closed at a time.

    Returns {layer: (what its gate reads (n, C), KL(dense || without it) in nats (n,))}, for each answer token
    of the groups of samples, or each sequence.
    """
    model.eval()
    gates = routers(model)
    reads, harms = {i: [] for i in gates}, {i: [] for i in gates}
    with dense(model):
        for group in tqdm(groups, "harm of each layer", unit="batch"):
            batch = Batch.of(group, device)
            ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
            streams = [model.embed(batch.idx)]                                 # before each layer, (B, T, C)
            for layer in model.layers:
                streams.append(layer(streams[-1], ctx))
            log_p = log_probabilities(model, streams.pop()[batch.scored])
            row = batch.scored.nonzero()[:, 0]
            for i, gate in gates.items():
                x = model.layers[i].attn(streams[i], ctx) if gate.part == "mlp" else streams[i]
                h = gate.pooled(gate.read(x, ctx), ctx)
                threshold, gate.bypass, gate.threshold = gate.threshold, False, CLOSED
                x = model.run(streams[i], ctx, i)[batch.scored]
                gate.bypass, gate.threshold = True, threshold
                harm = divergence(log_p, log_probabilities(model, x))
                if gate.scope == "sequence":
                    harm = torch.stack([harm[row == b].mean() for b in range(len(h))])
                reads[i].append(h if gate.scope == "sequence" else h[batch.scored])
                harms[i].append(harm)
    return {i: (torch.cat(reads[i]), torch.cat(harms[i])) for i in gates}


@torch.no_grad()
def close_greedily(model, groups, device):
    """Close whole layers, half of those with a gate, each time the one that adds least to the harm of those
    already closed.

    Returns {layer: KL(dense || model) that it added, nats a token}, in that order, then the others. The more
    are closed the more harm a further one does, so that an earlier figure is a lower bound: only the layer
    that has the least is measured anew (accelerated greedy, Minoux 1978).
    """
    model.eval()
    gates, measured, order, total = routers(model), [], {}, 0.0
    for group in groups:
        batch = Batch.of(group, device)
        ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
        with dense(model):
            measured.append((batch, ctx, model.run(model.embed(batch.idx), ctx)[batch.scored]))

    def harm_without(layers):
        for i, gate in gates.items():
            gate.bypass, gate.threshold = i not in layers, CLOSED
        kl = []
        for batch, ctx, reference in measured:
            x = model.run(model.embed(batch.idx), ctx)[batch.scored]
            kl.append(divergence(log_probabilities(model, reference), log_probabilities(model, x)))
        return float(torch.cat(kl).mean())

    heap = [(0.0, i, -1) for i in gates]          # (harm it adds, layer, how many were closed when measured)
    with tqdm(total=len(gates) // 2, desc="closing layers", unit="layer") as bar:
        while len(order) < len(gates) // 2:
            harm, i, when = heappop(heap)
            if when < len(order):
                heappush(heap, (harm_without([*order, i]) - total, i, len(order)))
                continue
            order[i], total = harm, total + harm
            bar.update()
    for gate in gates.values():
        gate.bypass, gate.threshold = False, 0.5
    return order | {i: harm for harm, i, _ in sorted(heap)}


@torch.no_grad()
def warm_start(model, samples, args, device):
    """Begin with routers that predict the harm of skipping.

    Gates that are all open would start where the KL has no slope, and fall in step until whole layers close
    at once. Token level: ridge regression of each token's log harm on what the layer's gate reads gives w and
    b, and one threshold for all layers the capacity. Sequence level: a few dozen prompts do not tell which
    sequences need which layer, so w = 0, and b is the log of the harm a layer adds to those that close before
    it.
    """
    gates = routers(model)
    groups = list(islice(batches(samples, min(args.tokens, WARM_TOKENS), args.seed), WARM_BATCHES))
    free = 1 - len(gates) / model.config.n_layer
    if args.granularity.endswith("sequence"):
        harm = close_greedily(model, groups, device)
        order = sorted(harm, key=harm.get)
        closed = round((1 - args.capacity) * model.config.n_layer)
        logs = [math.log(max(harm[i], 1e-4)) for i in order]
        level = (logs[max(0, closed - 1)] + logs[min(closed, len(logs) - 1)]) / 2
        for i, log in zip(order, logs):
            gates[i].router.bias.fill_(log - level)
        return
    predicted = []
    for i, (h, harm) in measure_harm(model, groups, device).items():
        y, centred = (harm + 0.01).log(), h - h.mean(0)
        square = centred.T @ centred                                             # (C, C)
        ridge = 0.3 * square.diagonal().mean() * torch.eye(len(square), device=device)
        w = torch.linalg.solve(square + ridge, centred.T @ (y - y.mean()))
        gates[i].router.weight[0], gates[i].router.bias[0] = w, y.mean() - h.mean(0) @ w
        predicted.append(h @ w + gates[i].router.bias)
    closed = (1 - first_target(args)) / (1 - free)                               # of the routed gates
    level = torch.cat(predicted).float().quantile(min(1.0, closed))
    for gate in gates.values():
        gate.router.bias -= level


def train(model, samples, args, device):
    """Tune the model's routers; metrics.jsonl, the router file and the checkpoint are left in args.out."""
    gates = routers(model)
    parameters = [p for gate in gates.values() for p in gate.router.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)
    out, stop = Path(args.out), []
    start, log = resume(model, optimizer, args) if args.resume else (0, [])
    write_file(out / "metrics.jsonl", b"".join(log))
    if start == 0 and args.start == "harm":
        warm_start(model, samples, args, device)
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))   # the step that is running is finished first
    source = batches(samples, args.tokens, args.seed)
    for _ in range(start * args.accumulate):
        next(source)
    model.train()
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step")
    for step in bar:
        group = [Batch.of(next(source), device) for _ in range(args.accumulate)]
        weight = 1 / sum(len(batch.targets) for batch in group)
        target, loss, used = target_capacity(step, args), 0.0, 0.0
        for batch in group:
            loss += backward(model, batch, args.loss, weight, target, args.penalty / args.accumulate)
            used += overall(model).detach() / args.accumulate
        loss, used = float(loss), float(used)
        if not math.isfinite(loss):
            raise InputError(f"step {step}: the loss is {loss}; the last checkpoint in {out} is kept; lower"
                             " --lr or use --dtype float32")
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        line = {"step": step, "loss": loss, "capacity": used, "target": target, "lr": lr}
        append(out / "metrics.jsonl", json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{loss:.3f}", capacity=f"{used:.3f}")
        if stop or step + 1 == args.steps or (step + 1) % args.save_every == 0:
            save(model, optimizer, step + 1, args)
        if stop:
            bar.close()
            print(f"stopped after step {step + 1} of {args.steps}, saved in {out}; --resume goes on",
                  file=sys.stderr)
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@torch.no_grad()
def calibrate(model, samples, args, device):
    """Set the threshold that gives --capacity, and measure which capacities other thresholds give.

    The penalty leaves the capacity near its target, on one side or the other from batch to batch, and other
    text uses another capacity than the text that was trained on. So the threshold is set on some training
    samples, as they are and as plain text: first on a grid, then by bisection. Returns all that was measured,
    [(threshold, overall capacity)]. No head is needed; where gates read prompts, prompts will do, and more of
    them are needed: there is one decision a sequence, not one a token.
    """
    model.eval()
    some = samples[:CALIBRATION_SAMPLES]
    answers = [i for s in some for i, answer in zip(s.ids, s.answer) if answer]
    piece = PLAIN_PIECE
    if args.granularity.endswith("sequence") and args.pool == "prompt":
        some = [Sample(s.ids[:s.prompt], s.answer[:s.prompt], s.prompt) for s in samples[:8 * len(some)]]
        piece = PLAIN_PROMPT
    plain = [answers[i:i + piece] for i in range(0, len(answers), piece)]
    plain = [Sample(ids, [True] * len(ids), min(len(ids), PLAIN_PROMPT)) for ids in plain]
    kinds = [[Batch.of(group, device) for group in pack(kind, 2 * args.tokens)] for kind in (some, plain)]
    measured = []

    def used(logit):
        for gate in routers(model).values():
            gate.threshold = 1 / (1 + math.exp(-logit))
        usages = [Usage(model) for _ in kinds]
        for groups, usage in zip(kinds, usages):
            for batch in groups:
                ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
                model.run(model.embed(batch.idx), ctx)
                usage.add()
        mean = sum(usage.summary()["capacity"] for usage in usages) / len(usages)
        measured.append((gate.threshold, mean))
        return mean

    below = [logit for logit in CALIBRATION_LOGITS if used(logit) > args.capacity]
    low, high = max(below, default=-4), min({*CALIBRATION_LOGITS, 4} - {*below})
    for _ in range(4):
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) > args.capacity else (low, middle)
    best = min(measured, key=lambda pair: abs(pair[1] - args.capacity))[0]
    for gate in routers(model).values():
        gate.threshold = best
    return measured


def append(path, text):
    try:
        with open(path, "a") as f:
            f.write(text)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror}); the last checkpoint is kept") from None


SAME_ON_RESUME = ("model", "dtype", "seed", "data", "granularity", "layers", "capacity", "loss", "steps",
                  "start", "lr", "penalty", "tokens", "accumulate", "pool", "held_out")


def save(model, optimizer, step, args):
    """The router file, and the checkpoint a run continues from: routers, AdamW's moments, the step."""
    tensors = {}
    for layer, gate in routers(model).items():
        for name, p in gate.router.named_parameters():
            state = optimizer.state[p]
            tensors |= {f"layers.{layer}.{name}": p.detach(), f"layers.{layer}.{name}.m": state["exp_avg"],
                        f"layers.{layer}.{name}.v": state["exp_avg_sq"]}
    arguments = {key: str(getattr(args, key)) for key in SAME_ON_RESUME}
    meta = {"step": str(step), "arguments": json.dumps(arguments)}
    save_routers(model, Path(args.out) / "routers.safetensors", command=args.command)
    write_file(Path(args.out) / "checkpoint.safetensors",
               safetensors_bytes({k: t.cpu().contiguous() for k, t in tensors.items()}, metadata=meta))


def resume(model, optimizer, args):
    """Load the checkpoint in args.out; returns its step, and the lines of metrics.jsonl up to there."""
    path = Path(args.out) / "checkpoint.safetensors"
    if not path.exists():
        raise InputError(f"--resume: there is no {path}; run without --resume")
    file = open_safetensors(path)
    meta = file.metadata() or {}
    if "step" not in meta or "arguments" not in meta:
        raise InputError(f"{path}: not a checkpoint of train_router.py")
    then, step = json.loads(meta["arguments"]), int(meta["step"])
    for key in SAME_ON_RESUME:
        if then.get(key) != str(getattr(args, key)):
            flag = "--" + key.replace("_", "-")
            raise InputError(f"--resume: {path} was made with {flag} {then.get(key)}, now it is"
                             f" {getattr(args, key)}; give the same, or start afresh without --resume")
    for layer, gate in routers(model).items():
        for name, p in gate.router.named_parameters():
            key = f"layers.{layer}.{name}"
            p.data.copy_(file.get_tensor(key))
            optimizer.state[p] = {"step": torch.tensor(float(step)),
                                  "exp_avg": file.get_tensor(key + ".m").to(p.device),
                                  "exp_avg_sq": file.get_tensor(key + ".v").to(p.device)}
    metrics = Path(args.out) / "metrics.jsonl"
    return step, metrics.read_bytes().splitlines(keepends=True)[:step] if metrics.exists() else []


# ---------------------------------------------------------------------------------------------------- script

def common_arguments(parser):
    """The flags that every script has."""
    parser.add_argument("--model", default="smollm2-135m",
                        help="smollm2-135m, a Hugging Face folder, a .gguf file or a hub id")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="auto: bfloat16 where the hardware has it")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run_script(name, main):
    """main(), with bad input told in one sentence and exit status 1, and Ctrl-C without a traceback."""
    try:
        main()
    except InputError as e:
        sys.exit(f"{name}: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


def parse_arguments():
    p = common_arguments(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    p.add_argument("--data", default=str(DEFAULT_DATA), help="Alpaca JSON or JSONL, chat JSONL or plain text")
    p.add_argument("--granularity", default="attn_token", choices=GRANULARITIES)
    p.add_argument("--layers", default="all", help="which layers get a router: all, last:16, 2-29 or 3,5,9")
    p.add_argument("--capacity", type=float, default=0.8, help="share of the sublayers that should still run")
    p.add_argument("--loss", default="kl", choices=("kl", "ce"))
    p.add_argument("--steps", type=int, default=160)
    p.add_argument("--out", default="out", help="folder for the routers, metrics.jsonl and the checkpoint")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--start", default="harm", choices=("harm", "open"),
                   help="routers that predict each layer's harm, or open ones")
    p.add_argument("--lr", type=float, help="learning rate (default: 0.004 at token level, 0.001 at"
                   " sequence level, where there is one decision a prompt to learn from)")
    p.add_argument("--penalty", type=float, default=5.0, help="lambda, the price of excess capacity")
    p.add_argument("--tokens", type=int, help="tokens a batch (default: 768 on a CPU, 16384 on CUDA)")
    p.add_argument("--accumulate", type=int, default=1, help="batches a step")
    p.add_argument("--pool", default="prompt", choices=("prompt", "all"), help="what a sequence's gate reads")
    p.add_argument("--held-out", type=int, default=HELD_OUT,
                   help="samples at the end of --data kept for the table")
    p.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    args = p.parse_args()
    if args.lr is None:
        args.lr = 0.004 if args.granularity.endswith("token") else 0.001
    args.command = " ".join(["python train_router.py", *(a for a in sys.argv[1:] if a != "--resume")])
    return args


def check(args, n_layer):
    """Refuse impossible numbers before any work is done."""
    for name in "steps", "accumulate", "held_out", "save_every", "tokens":
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} should be at least 1; it is {getattr(args, name)}")
    for name in "lr", "penalty":
        if not 0 <= getattr(args, name) < math.inf:
            raise InputError(f"--{name} should be a number from 0 up; it is {getattr(args, name)}")
    free = n_layer - len(parse_layers(args.layers, n_layer))
    if not 0 < args.capacity <= 1:
        raise InputError(f"--capacity should be above 0 and at most 1; it is {args.capacity}")
    if args.capacity < free / n_layer:
        raise InputError(f"--capacity {args.capacity}: {free} of {n_layer} layers have no router and always"
                         f" run, so the least possible is {free / n_layer:.3f}; raise it, or add --layers")


def report(result, args):
    """The final table."""
    print(f"\nheld out: {result['tokens']:,} answer tokens")
    print(f"{'':8}{'loss':>8}{'perplexity':>12}{'KL to dense':>13}{'capacity overall':>18}{'routed':>8}")
    print(f"{'dense':8}{result['dense_loss']:8.4f}{math.exp(result['dense_loss']):12.3f}{0:13.4f}{1:18.3f}{1:8.3f}")
    print(f"{'routed':8}{result['loss']:8.4f}{math.exp(result['loss']):12.3f}{result['kl']:13.4f}"
          f"{result['capacity']:18.3f}{result['routed_capacity']:8.3f}")
    print(f"\nhow often each layer's {args.granularity.split('_')[0]} ran")
    for layer, share in result["keep"].items():
        print(f"{layer:4d} {'█' * round(40 * share):40} {share:.3f}")
    print(f"\n{Path(args.out) / 'routers.safetensors'}")


def main():
    args = parse_arguments()
    device, dtype = pick(args.device, args.dtype)
    args.tokens = args.tokens if args.tokens is not None else 768 if device.type == "cpu" else 16384
    tok = Tokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, device, dtype)
    check(args, model.config.n_layer)
    samples, cut = read_samples(args.data, tok, model.config.max_context)
    if cut:
        print(f"{cut} samples were longer than the context of {model.config.max_context} tokens and were cut",
              file=sys.stderr)
    if len(samples) < 2:
        raise InputError(f"{args.data}: {len(samples)} usable samples; at least 2 are needed, one to hold"
                         " out")
    held_out = min(args.held_out, max(1, len(samples) // 5))
    train_set, test_set = samples[:-held_out], samples[-held_out:]
    torch.manual_seed(args.seed)
    add_routers(model, args.granularity, args.layers, pool=args.pool)
    train(model, train_set, args, device)
    calibration = calibrate(model, train_set, args, device)
    result = evaluate(model, test_set, args.tokens, device)
    save_routers(model, Path(args.out) / "routers.safetensors", calibration, command=args.command,
                 held_out=json.dumps(result))
    report(result, args)


if __name__ == "__main__":
    run_script("train_router.py", main)
