"""Router tuning: a pretrained Llama is frozen, and only its routers, one linear layer each, are trained.

    python train_router.py                      # smollm2-135m, data/instructions.jsonl
    python train_router.py --data alpaca.jsonl --capacity 0.73 --out out/alpaca
    python train_router.py --resume             # go on where Ctrl-C stopped

The loss is that of the answers' tokens: the KL divergence from the dense model's distribution (kl: no
labels, it asks that the model behave as before), or the cross-entropy (ce, the paper's). To it comes a
price on capacity, moved so that capacity follows a target, which falls to --capacity over the first half of
the run. Gates are ramps at first, and grow steeper (see router.ramp); at sequence level with kl no gradient
is taken: routers are fitted to measured harm (see harm.py). With kl every second batch is text that the
model itself wrote, so that other text than the data is treated alike. At the end the threshold is moved,
from 0.5, until the capacity is met on training samples and on such text. Layers below the first router need
no autograd graph, and with kl their output serves both passes.

--train tells what is compared with it: bias learns one set of layers for all text, all trains the whole model
with its routers, as Mixture of Depths does, and leaves it in out/model.
"""
import argparse
import ctypes
import json
import math
import signal
import sys
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from harm import ByHarm, divergence, log_probabilities
from model import Llama, checkpoint_parts, pick
from router import (
    GRANULARITIES,
    Usage,
    add_routers,
    dense,
    overall,
    parse_layers,
    remove_routers,
    routers,
    save_routers,
    trace,
)
from samples import (
    PLAIN_PROMPT,
    Batch,
    Sample,
    batches,
    pack,
    pieces,
    read_samples,
)
from tokenizer import Tokenizer
from weights import InputError, open_checkpoint, open_safetensors, write_file, write_folder

DEFAULT_DATA = Path(__file__).parent / "data" / "instructions.jsonl"
TOKENS = {"cpu": (512, 768), "cuda": (16384, 2048)}     # tokens a batch, and where harm is measured
HEAD_CHUNK = 128      # tokens whose logits exist at once
OWN_TEXTS, OWN_TOKENS = 96, 256       # texts that the model writes, and tokens of each
RAMP = 0.5, 0.1       # widths of the gates' ramp in logits, first and last
CALIBRATION_SAMPLES = 24
CALIBRATION_LOGITS = -0.5, -0.25, -0.12, 0, 0.12, 0.25, 0.5       # of the threshold
BIAS_LR = 0.02        # of the routers' biases at sequence level, and where only they train
MODEL_LR = 1e-5       # of the model's own weights, with --train all
HELD_OUT = 64         # samples at the end of --data that are kept for the table


# ------------------------------------------------------------------------------------------------------ loss

def two_passes(model, batch, teacher=None):
    """The residual stream where a next token is scored, (N, C): the routed model's, and the dense `teacher`'s
    (None without one). A model can be its own teacher: then what lies below the first router serves both."""
    whole = model.embed.weight.requires_grad                         # --train all
    first = 0 if whole or teacher not in (None, model) else min(routers(model), default=model.config.n_layer)
    ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
    with torch.set_grad_enabled(whole and torch.is_grad_enabled()):
        below = model.run(model.embed(batch.idx), ctx, 0, first)
    reference = None
    if teacher is not None:
        with torch.no_grad(), dense(teacher):
            x = below if teacher is model else teacher.embed(batch.idx)
            reference = teacher.run(x, ctx, first)[batch.scored]
    return model.run(below, ctx, first)[batch.scored], reference


@torch.no_grad()
def token_losses(logits, targets, log_p=None):
    """Each token's cross-entropy (n,) with its target or, given the teacher's log_p (n, V), KL(p || q); and
    the gradient of their sum at the logits (n, V), float32: q - p, where p is the target or the teacher's.
    Overwrites log_p."""
    log_q = logits.float().log_softmax(-1)
    if log_p is not None:
        losses = divergence(log_p, log_q)
        return losses, log_q.exp_().sub_(log_p.exp_())
    losses = F.nll_loss(log_q, targets, reduction="none")
    return losses, log_q.exp_().scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None])


def backward(model, batch, kind, weight, price, teacher=None):
    """Add a batch's gradients to what trains; returns the sum of its tokens' losses times `weight`, a tensor.

    The logits, vocab_size numbers a token, exist for HEAD_CHUNK tokens at a time: the head's gradient is
    gathered chunk by chunk at its input, then sent through the layers in one go, together with that of
    `price` times the overall capacity.
    """
    teacher = teacher or model
    x, reference = two_passes(model, batch, teacher if kind == "kl" else None)
    leaf, total = x.detach().requires_grad_(), 0.0
    for i in range(0, len(leaf), HEAD_CHUNK):
        part = slice(i, i + HEAD_CHUNK)
        logits = model.head(model.norm(leaf[part]))                           # (n, V)
        losses, gradient = token_losses(logits, batch.targets[part], None if reference is None else
                                        log_probabilities(teacher, reference[part]))
        total = total + losses.sum() * weight
        logits.backward(gradient.mul_(weight).to(logits.dtype))
        del logits, gradient                                                  # before the next of their size
    torch.autograd.backward([x, price * overall(model)], [leaf.grad, None])
    return total


@torch.no_grad()
def evaluate(model, samples, budget, device, teacher=None):
    """Dense and routed loss, KL(dense || routed) in nats a token, and each layer's keep rate, on samples."""
    teacher = teacher or model.eval()
    model.eval()
    sums, tokens, usage = torch.zeros(3, dtype=torch.float64), 0, Usage(model)
    for group in pack(samples, budget):
        batch = Batch.of(group, device)
        x, reference = two_passes(model, batch, teacher)
        for i in range(0, len(x), HEAD_CHUNK):
            part = slice(i, i + HEAD_CHUNK)
            log_p, log_q = log_probabilities(teacher, reference[part]), log_probabilities(model, x[part])
            ce = [F.nll_loss(log, batch.targets[part], reduction="sum") for log in (log_p, log_q)]
            sums += torch.stack([*ce, divergence(log_p, log_q).sum()]).cpu()
        tokens += len(x)
        usage.add()
    dense_loss, loss, kl = (sums / tokens).tolist()
    return {"tokens": tokens, "dense_loss": dense_loss, "loss": loss, "kl": kl} | usage.summary()


# -------------------------------------------------------------------------------------------------- training

def learning_rate(step, steps, peak):
    """Warm-up over the first 5 % of the steps, then a cosine down to a fiftieth."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.51 + 0.49 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def target_capacity(step, args):
    """Falls from 1 to --capacity over the first half of the run."""
    return 1 - (1 - args.capacity) * min(1.0, 2 * (step + 1) / args.steps)


class Price:
    """Lambda, what a unit of capacity costs: raised while more is used than the target, lowered while less,
    and not below 0. Dual ascent with a damping term: the price follows at once, its level slowly."""

    def __init__(self, first):
        self.level = self.now = first

    def update(self, excess):
        self.level = max(0.0, self.level + 0.5 * excess)
        self.now = max(0.0, self.level + 10 * excess)


def ramp_width(step, args):
    """Of the gates' ramp, in logits: falls over the first four fifths of the run; 0 is the step itself."""
    if args.estimator == "straight-through":
        return 0.0
    first, last = RAMP
    return first * (last / first) ** min(1.0, 1.25 * step / args.steps)


def trained(model):
    """{name: parameter} of what trains."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class ByGradient:
    """Tuning by AdamW on the loss and a price of capacity; the routers learn at --lr, the model at MODEL_LR.

    Where there is one decision a sequence, there is little to learn from: which layers close for all is found
    first, by biases that learn fast.
    """

    def __init__(self, model, args, teacher, kinds):
        self.model, self.args, self.teacher = model, args, teacher
        self.prices = [Price(args.penalty) for _ in range(kinds)]
        if args.train == "all":
            model.requires_grad_(True)
        for gate in routers(model).values():
            gate.router.weight.requires_grad_(args.train != "bias")
        fast = args.granularity.endswith("sequence") or args.train == "bias"
        groups = {}
        for name, p in trained(model).items():
            ours = BIAS_LR if fast and name.endswith("bias") else args.lr
            groups.setdefault(ours if ".router." in name else MODEL_LR, []).append(p)
        groups = [{"params": of, "peak": peak} for peak, of in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, group, step, target):
        """Learn from a list of batches; returns what the log keeps."""
        args, weight = self.args, 1 / sum(len(batch.targets) for batch in group)
        loss, used = 0.0, {}                                 # used: {price: the capacities of its batches}
        for gate in routers(self.model.train()).values():
            gate.width = ramp_width(step, args)
        for i, batch in enumerate(group):
            price = self.prices[(step * args.accumulate + i) % len(self.prices)]
            loss += backward(self.model, batch, args.loss, weight, price.now / args.accumulate, self.teacher)
            used.setdefault(price, []).append(float(overall(self.model).detach()))
        loss, paid = float(loss), sum(price.now * len(some) for price, some in used.items())
        line = {"step": step, "loss": loss, "target": target,
                "capacity": sum(map(sum, used.values())) / len(group),
                "lambda": paid / len(group), "lr": learning_rate(step, args.steps, args.lr)}
        for price, some in used.items():
            price.update(sum(some) / len(some) - target)
        if math.isfinite(loss):
            for part in self.optimizer.param_groups:
                part["lr"] = learning_rate(step, args.steps, part["peak"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        return line

    def state(self):
        """Tensors and a dict to continue from: what trains, AdamW's moments, lambda."""
        tensors = {}
        for name, p in trained(self.model).items():
            state = self.optimizer.state[p]
            tensors |= {name: p.detach(), f"{name}.m": state["exp_avg"], f"{name}.v": state["exp_avg_sq"]}
        return tensors, {"prices": [vars(price) for price in self.prices]}

    def restore(self, file, numbers, step):
        for price, then in zip(self.prices, numbers["prices"]):
            vars(price).update(then)
        for name, p in trained(self.model).items():
            p.data.copy_(file.get_tensor(name))
            self.optimizer.state[p] = {"step": torch.tensor(float(step)),
                                       "exp_avg": file.get_tensor(name + ".m").to(p.device),
                                       "exp_avg_sq": file.get_tensor(name + ".v").to(p.device)}


def train(model, kinds, args, device, teacher=None):
    """Tune the model's routers on one or two kinds of samples, in turns; metrics.jsonl, the router file and
    the checkpoint are left in args.out."""
    method = ByHarm(model, args.train == "bias") if args.estimator == "harm" else \
        ByGradient(model, args, teacher, len(kinds))
    out, stop = Path(args.out), []
    start, log = resume(method, args) if args.resume else (0, [])
    write_file(out / "metrics.jsonl", b"".join(log))
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))   # the step that is running is finished first
    source = chain.from_iterable(zip(*[batches(samples, args.tokens, args.seed) for samples in kinds]))
    for _ in range(start * args.accumulate):
        next(source)
    bar = tqdm(range(start, args.steps), initial=start, total=args.steps, unit="step")
    for step in bar:
        group = [Batch.of(next(source), device) for _ in range(args.accumulate)]
        line = method.step(group, step, target_capacity(step, args))
        if not math.isfinite(line["loss"]):
            raise InputError(f"step {step}: the loss is {line['loss']}; the last checkpoint in {out} is kept;"
                             " lower --lr or use --dtype float32")
        append(out / "metrics.jsonl", json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{line['loss']:.3f}", capacity=f"{line['capacity']:.3f}")
        if stop or step + 1 == args.steps or (step + 1) % args.save_every == 0:
            save(model, method, step + 1, args)
        if stop:
            bar.close()
            print(f"stopped after step {step + 1} of {args.steps}, saved in {out}; --resume goes on",
                  file=sys.stderr)
            sys.exit(130)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for gate in routers(model).values():
        gate.width = 0.0


def own_text(model, args):
    """Token ids (n, 256) that the dense model writes after random first tokens, as in LLM-QAT (arXiv
    2305.17888): text of another kind than the training data, to calibrate on and, with kl, to learn from,
    since what the model says of a text is known without labels."""
    torch.manual_seed(args.seed)
    new = min(OWN_TOKENS, model.config.max_context) - 1
    n = OWN_TEXTS if args.loss == "kl" else CALIBRATION_SAMPLES
    first = torch.randint(model.config.vocab_size, (n, 1), device=model.embed.weight.device)
    with tqdm(total=new, desc="the model writes", unit="token", leave=False) as bar:
        text = model.generate(first, new, temperature=1.0, on_token=lambda _: bar.update())
    model.cache = None
    return text


@torch.no_grad()
def answers_capacity(model, groups):
    """Overall capacity on batches, where gates decide for tokens on those of the answers alone. The words
    before them, a template's in every sample, tell nothing of other text."""
    opened = seen = 0
    for batch in groups:
        ctx = model.context(batch.idx, batch.lengths, batch.prompt_lengths)
        with trace(model) as decisions:
            model.run(model.embed(batch.idx), ctx)
        for is_open, in decisions.values():                                          # (B,) or (B, T)
            counted = is_open[batch.scored.cpu()] if is_open.dim() == 2 else is_open
            opened, seen = opened + int(counted.sum()), seen + len(counted)
    return 1 - (1 - opened / seen) * len(routers(model)) / model.config.n_layer


@torch.no_grad()
def calibrate(model, samples, text, args, device):
    """Set the threshold that gives --capacity, and measure which capacities other thresholds give.

    The penalty leaves the capacity near its target, on one side or the other from batch to batch, and other
    text uses another capacity than the text that was trained on. So the threshold is set on some training
    samples and, with as much weight, on `text` that the model wrote: first on a grid, then by bisection.
    Returns all that was measured, [(threshold, overall capacity)]. No head is needed; where gates read
    prompts, prompts will do, and more of them are needed: there is one decision a sequence, not one a token.
    """
    model.eval()
    some, size = samples[:CALIBRATION_SAMPLES], OWN_TOKENS
    if args.granularity.endswith("sequence") and args.pool == "prompt":
        some = [Sample(s.ids[:s.prompt], s.answer[:s.prompt], s.prompt) for s in samples[:8 * len(some)]]
        size = PLAIN_PROMPT
    kinds = [[Batch.of(group, device) for group in pack(kind, 2 * args.tokens)]
             for kind in (some, pieces(text, size))]
    measured = []

    def used(logit):
        for gate in routers(model).values():
            gate.threshold = 1 / (1 + math.exp(-logit))
        mean = sum(answers_capacity(model, groups) for groups in kinds) / len(kinds)
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


SAME_ON_RESUME = ("model", "dtype", "seed", "data", "granularity", "layers", "capacity", "train", "loss",
                  "estimator", "steps", "lr", "penalty", "tokens", "accumulate", "pool", "held_out")


def save(model, method, step, args):
    """The router file, and the checkpoint a run continues from."""
    tensors, numbers = method.state()
    arguments = {key: str(getattr(args, key)) for key in SAME_ON_RESUME}
    meta = {"step": str(step), "arguments": json.dumps(arguments), "numbers": json.dumps(numbers)}
    save_routers(model, Path(args.out) / "routers.safetensors", command=args.command)
    write_file(Path(args.out) / "checkpoint.safetensors",
               safetensors_bytes({k: t.cpu().contiguous() for k, t in tensors.items()}, metadata=meta))


def resume(method, args):
    """Load the checkpoint in args.out; returns its step, and the lines of metrics.jsonl up to there."""
    path = Path(args.out) / "checkpoint.safetensors"
    if not path.exists():
        raise InputError(f"--resume: there is no {path}; run without --resume")
    file = open_safetensors(path)
    meta = file.metadata() or {}
    if not {"step", "arguments", "numbers"} <= meta.keys():
        raise InputError(f"{path}: not a checkpoint of train_router.py")
    then, step = json.loads(meta["arguments"]), int(meta["step"])
    for key in SAME_ON_RESUME:
        if then.get(key) != str(getattr(args, key)):
            flag = "--" + key.replace("_", "-")
            raise InputError(f"--resume: {path} was made with {flag} {then.get(key)}, now it is"
                             f" {getattr(args, key)}; give the same, or start afresh without --resume")
    method.restore(file, json.loads(meta["numbers"]), step)
    metrics = Path(args.out) / "metrics.jsonl"
    return step, metrics.read_bytes().splitlines(keepends=True)[:step] if metrics.exists() else []


def save_model(model, source, folder):
    """The model without its routers, in the Hugging Face layout; config and tokenizer are its `source`'s."""
    remove_routers(model)
    tensors = {}
    for name, p in model.named_parameters():
        for theirs, part in zip(*checkpoint_parts(name, p.detach().cpu(), model.config)):
            tensors[theirs] = part.contiguous()
    write_folder(folder, open_checkpoint(source), tensors)


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


def keep_freed_memory():
    """Have glibc keep what is freed for what is allocated next. By default every layer's large tensors go
    back to the system and return as pages to be zeroed: a sixth of a prefill's time on a CPU, a tenth of
    tuning's."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 2**30)                                               # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)                                           # M_TRIM_THRESHOLD


def run_script(name, main):
    """main(), with bad input told in one sentence and exit status 1, and Ctrl-C without a traceback."""
    keep_freed_memory()
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
    p.add_argument("--train", default="routers", choices=("routers", "bias", "all"),
                   help="what trains: the routers; only their biases, which closes the same layers for every"
                   " text; or the whole model with its routers, as Mixture of Depths does")
    p.add_argument("--loss", default="kl", choices=("kl", "ce"))
    p.add_argument("--estimator", choices=("ramp", "straight-through", "harm"),
                   help="of the gates' gradient: a ramp that grows steeper, or the paper's; or none, but a"
                   " regression on measured harm (default: harm at sequence level with kl, else ramp)")
    p.add_argument("--steps", type=int, help="(default: 160, or 48 of measuring harm)")
    p.add_argument("--out", default="out", help="folder for the routers, metrics.jsonl and the checkpoint")
    p.add_argument("--resume", action="store_true", help="continue the run in --out")
    p.add_argument("--lr", type=float, help="learning rate of the routers (default: 0.002 at token level,"
                   " 0.0003 at sequence level)")
    p.add_argument("--penalty", type=float, default=2.0, help="lambda, the price of capacity, to begin with")
    p.add_argument("--tokens", type=int, help="tokens a batch (default: 512 on a CPU, 16384 on CUDA; 768 and"
                   " 2048 where harm is measured)")
    p.add_argument("--accumulate", type=int, default=1, help="batches a step")
    p.add_argument("--pool", default="prompt", choices=("prompt", "all"), help="what a sequence's gate reads")
    p.add_argument("--held-out", type=int, default=HELD_OUT,
                   help="samples at the end of --data kept for the table")
    p.add_argument("--save-every", type=int, default=20, help="steps between checkpoints")
    args = p.parse_args()
    if args.train == "all" and args.dtype == "auto":
        args.dtype = "float32"                       # steps of 1e-5 would be lost in bfloat16's rounding
    sequence = args.granularity.endswith("sequence")
    if args.estimator is None:
        args.estimator = "harm" if sequence and args.loss == "kl" and args.train != "all" else "ramp"
    if args.estimator == "harm" and (not sequence or args.loss != "kl" or args.train == "all"):
        raise InputError("--estimator harm: only for gates at sequence level, --loss kl and a frozen model")
    if args.steps is None:
        args.steps = 48 if args.estimator == "harm" else 160
    if args.lr is None:
        args.lr = 0.0003 if sequence else 0.002
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
    if args.tokens is None:
        args.tokens = TOKENS[device.type][args.estimator == "harm"]
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
    text = own_text(model, args)
    add_routers(model, args.granularity, args.layers, pool=args.pool)
    teacher = Llama.from_pretrained(args.model, device, dtype).requires_grad_(False) \
        if args.train == "all" else model
    kinds, size = [train_set], OWN_TOKENS
    if args.estimator == "harm":                     # with one decision a piece, as much should be at stake
        size = max(8, sum(sum(s.answer) for s in train_set) // len(train_set))
    if args.loss == "kl":
        kinds.append(pieces(text[CALIBRATION_SAMPLES:], size))
    train(model, kinds, args, device, teacher)
    calibration = calibrate(model, train_set, text[:CALIBRATION_SAMPLES], args, device)
    result = evaluate(model, test_set, args.tokens, device, teacher)
    save_routers(model, Path(args.out) / "routers.safetensors", calibration, command=args.command,
                 held_out=json.dumps(result))
    report(result, args)
    if args.train == "all":
        save_model(model, args.model, Path(args.out) / "model")
        print(f"{Path(args.out) / 'model'}: the model they were trained with")


if __name__ == "__main__":
    run_script("train_router.py", main)
