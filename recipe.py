"""What a tuning run is made of, as values: PAPER, the published recipe, and DEFAULT, ours.

A Recipe is data: `train_router.py --recipe paper|default` takes one of the two, and a flag such as --loss or
--steps replaces one value of it. DEFAULT has other forms for other values of some flags: see `default_for`.
The small objects that a run needs besides are here too: the ramp, the penalty on capacity, the text that the
model writes. docs/METHOD.md says why each is as it is.

Method "harm" (harm.py) takes no gradient: the KL that closing each gate adds is measured, and the routers are
fitted to it by ridge regression.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from losses import reads_dense
from router import GATES, LinearRouter, dense, open_shares, overall_capacity, routed_share, straight_through
from support.batches import Batch, alternating, epochs
from support.data import pieces
from support.files import InputError
from support.own_text import write_text

OWN_TEXTS, OWN_TOKENS = 288, 256      # texts that the model writes, and tokens of each
CALIBRATION_TEXTS, CALIBRATION_TOKENS = 64, 128       # calibration reads the start of the first 64
NOT_LEARNED = 24                      # the first 24 are for calibration alone; tuning reads all others


# ---------------------------------------------------------------------------------------------- regularizers
def overall_penalty(model, penalty, target):
    """penalty * overall capacity. The target is unused here: Penalty moves lambda until it is met."""
    return penalty * overall_capacity(open_shares(model), model.config.n_layer)


def excess_penalty(model, penalty, target):
    """The paper's: penalty * the sum over routed layers of relu(c - c*), with c the layer's mean gate in the
    batch and c* the share of open gates that gives the overall capacity. A step of several batches takes
    the mean of their terms."""
    shares = open_shares(model)
    routed_target = routed_share(target, len(shares), model.config.n_layer)
    return penalty * sum(torch.relu(share - routed_target) for share in shares)


# --------------------------------------------------------------------------------------------------- recipes
@dataclass(frozen=True)
class Recipe:
    name: str
    gate: str                           # of router.GATES
    pool: str                           # what the gate of a sequence reads: "prompt" or "all"
    kv: str                             # which tokens have keys and values: "all" or "open"
    loss: str                           # of losses.LOSSES
    train: str                          # what trains: "routers", "bias" or "all"
    method: str                         # "ramp" or "straight-through": gradient of the gates; "harm": harm.py
    falls_until: float                  # the target falls from 1 to --capacity over this share of the steps
    learns_own_text: bool               # whether text that the model writes is learned from too
    calibrates: bool                    # whether the threshold is moved afterwards
    # gradient methods only ("ramp", "straight-through"):
    regularizer: Callable               # (model, lambda, target capacity) -> what is added to the loss, a
                                        # tensor in proportion to lambda
    penalty: float                      # lambda, the penalty on capacity, at first
    moves_penalty: bool                 # whether lambda follows the capacity, by dual ascent
    lr: float                           # peak learning rate of the routers
    betas: tuple                        # of AdamW, without weight decay
    warmup: float                       # share of the steps over which the learning rate rises
    final_lr: float                     # share of the peak where the cosine ends
    clip: float | None                  # norm that gradients are clipped to
    ramp_widths: tuple = (0.5, 0.1)     # in logits, first and last
    bias_lr: float | None = None        # peak learning rate of the routers' biases, if another
    model_lr: float = 1e-5              # of the model's weights, if they train
    # with every method:
    steps: int | None = None            # None: as many as `epochs` of `step_samples` need
    epochs: int = 1
    step_samples: int | None = None     # samples per step, of the training data alone; None: --accumulate
                                        # batches of --tokens tokens
    tokens_cpu: int = 256               # tokens per batch, where --tokens does not say
    tokens_cuda: int = 16384

    def learning_rate(self, step, steps, peak):
        """A linear warm-up, then a cosine down to final_lr."""
        warm = max(1, int(self.warmup * steps))
        if step < warm:
            return peak * (step + 1) / warm
        cosine = math.cos(math.pi * (step - warm) / max(1, steps - warm))
        return peak * ((1 + self.final_lr) / 2 + (1 - self.final_lr) / 2 * cosine)

    def target(self, step, steps, capacity):
        """The overall capacity that a step should have."""
        if not self.falls_until:
            return capacity
        return 1 - (1 - capacity) * min(1.0, (step + 1) / (self.falls_until * steps))

    def gate_estimator(self, step, steps):
        """The gate of a training step, (score, threshold) -> gate: the straight-through step, or a ramp whose
        width falls over the first four fifths of the run."""
        if self.method == "straight-through":
            return straight_through
        first, last = self.ramp_widths
        return partial(ramp, width=first * (last / first) ** min(1.0, 1.25 * step / steps))


PAPER = Recipe(
    name="paper", gate="unbiased", pool="all", kv="all", loss="ce", train="routers",
    method="straight-through", regularizer=excess_penalty, penalty=0.0, moves_penalty=False,
    falls_until=0.0, learns_own_text=False, calibrates=False, lr=1e-5,
    betas=(0.9, 0.999), warmup=0.03, final_lr=0.0, clip=1.0, step_samples=64, tokens_cpu=512)

DEFAULT = Recipe(
    name="default", gate="linear", pool="prompt", kv="all", loss="kl", train="routers", method="ramp",
    regularizer=overall_penalty, penalty=2.0, moves_penalty=True, falls_until=0.5,
    learns_own_text=True, calibrates=True, lr=0.004, betas=(0.9, 0.95), warmup=0.05,
    final_lr=0.02, clip=None, steps=160)

# DEFAULT is for token level. Its variants:
# sequence level, KL and a frozen model: harm is measured, see harm.py
BY_HARM = replace(DEFAULT, method="harm", steps=48, tokens_cpu=768, tokens_cuda=2048)
# other sequence level: a high bias_lr, as biases alone find the layers to close for every text
SEQUENCE = replace(DEFAULT, lr=0.0003, bias_lr=0.02, tokens_cpu=512)
# --train bias, by gradient
ONLY_BIASES = replace(DEFAULT, lr=0.02, tokens_cpu=512)

RECIPES = {"paper": PAPER, "default": DEFAULT}


def default_for(granularity, loss=DEFAULT.loss, train=DEFAULT.train, method=None, **_):
    """The variant of DEFAULT for this granularity and these of a run's values."""
    if method in (None, "harm") and can_measure_harm(granularity, loss, train):
        return BY_HARM
    if train == "bias":
        return ONLY_BIASES
    return DEFAULT if granularity.endswith("token") else SEQUENCE


def can_measure_harm(granularity, loss, train):
    return granularity.endswith("sequence") and loss == "kl" and train != "all"


def check_flags(args, recipe, n_embd):
    """Refuse flags of train_router.py that do not go together, or that the recipe would not read."""
    router = GATES[recipe.gate](n_embd, args.granularity.split("_")[1], recipe.pool)      # only to inspect
    if recipe.method == "harm":
        check_harm(args, recipe, router)
    if recipe.train == "bias" and getattr(router, "bias", None) is None:
        raise InputError(f"--train bias: gates of the kind {recipe.gate!r} have none; add --gate linear")
    if args.model_lr is not None and recipe.train != "all":
        raise InputError("--model-lr: only with --train all, where the model's weights learn; leave it out")
    if args.pool and args.granularity.endswith("token"):
        raise InputError("--pool: only for gates of sequences; one of a token reads that token; leave it out")
    if args.epochs and recipe.steps:
        raise InputError("--epochs: only with --recipe paper, whose steps have a fixed number of samples, and"
                         " not beside --steps; give --steps alone")
    if recipe.step_samples and args.accumulate > 1:
        raise InputError(f"--accumulate: not with --recipe {recipe.name}, whose steps have"
                         f" {recipe.step_samples} samples each; leave it out")


def check_harm(args, recipe, router):
    """Refuse what method "harm" cannot do; router: one of the recipe's gate."""
    is_linear = type(router).forward is LinearRouter.forward
    only_w_and_b = {name for name, _ in router.named_parameters()} == {"weight", "bias"}
    if not (is_linear and only_w_and_b and can_measure_harm(args.granularity, recipe.loss, recipe.train)):
        raise InputError("--method harm: only for linear gates at sequence level, with a bias and no more,"
                         " --loss kl and a frozen model; else give --method ramp")
    for flag in "lr", "penalty", "clip":
        if getattr(args, flag) is not None:
            raise InputError(f"--{flag}: only where gradients are taken; leave it out, or give --method ramp")
    if args.init:
        raise InputError("--init: --method harm fits routers afresh to what it measures; give --method ramp")


def choose_recipe(name, granularity, **values):
    """The recipe of a run: PAPER or a variant of DEFAULT, with all `values` replaced that are not None."""
    given = {key: value for key, value in values.items() if value is not None}
    recipe = RECIPES[name]
    if recipe is DEFAULT:
        recipe = default_for(granularity, **given)
    return replace(recipe, **given)


# ------------------------------------------------------------------------------------ ramp, penalty, own text
def ramp(score, threshold, width):
    """A gate between 0 and 1, one half at the threshold: sigmoid((logit(score) - logit(threshold)) / width).

    Why not a step: let closing a sublayer cost d. For g between 0 and 1 the loss is about (1 - g)^2 d, with
    slope -2 (1 - g) d. Opening the gate really changes the loss by -d, and that is the slope at g = 1/2. The
    straight-through step sees only the slopes at the ends, 0 at g = 1 and -2 d at g = 0; a ramp sees those in
    between.
    """
    threshold = min(max(threshold, 1e-6), 1 - 1e-6)
    return torch.sigmoid((torch.logit(score, 1e-6) - math.log(threshold / (1 - threshold))) / width)


class Penalty:
    """Lambda, moved by damped dual ascent: a PI controller of e, the excess of capacity over its target. The
    integral is level <- max(0, level + 0.5 e); the next step's lambda adds a term in proportion to e, value =
    max(0, level + 10 e)."""

    def __init__(self, first):
        self.level = self.value = first

    def update(self, excess):
        self.level = max(0.0, self.level + 0.5 * excess)
        self.value = max(0.0, self.level + 10 * excess)


def own_text(model, recipe, samples, seed, path=None, run=None, piece=None):
    """What the dense model writes after random first tokens, as in LLM-QAT (arXiv 2305.17888): text of
    another kind than the training samples, whose labels, the dense model's probabilities, are known.

    Returns (token ids (n, T) to calibrate on, Samples to learn from or None); (None, None) where neither is
    used. path: see write_text; run: a Run, whose checkpoints have the text; piece: join the texts and cut
    them anew into pieces of so many tokens (not for method "harm", whose pieces are as long as an answer).
    """
    learns = recipe.learns_own_text and reads_dense(recipe.loss)
    if not learns and not recipe.calibrates:
        return None, None
    n, n_tokens = (OWN_TEXTS, OWN_TOKENS) if learns else (CALIBRATION_TEXTS, CALIBRATION_TOKENS)
    n_tokens = min(n_tokens, model.config.max_context)
    write = partial(write_text, model, n, n_tokens, seed, path)
    with dense(model):
        ids = run.constant("own text", (n, n_tokens), write) if run else write()
    ids = ids.to(model.embed.weight.device)
    to_calibrate, texts = ids[:CALIBRATION_TEXTS, :CALIBRATION_TOKENS], ids[NOT_LEARNED:]
    if not learns:
        return to_calibrate, None
    if recipe.method == "harm":                  # one decision per piece: pieces as long as a mean answer
        n_tokens = max(8, sum(sum(s.answer) for s in samples) // len(samples))
    elif piece:
        n_tokens, texts = min(piece, model.config.max_context), texts.reshape(1, -1)
    return to_calibrate, pieces(texts.tolist(), n_tokens)


def make_source(recipe, by_kind, args, device):
    """Yields, forever, the batches of a step, a list of (kind of text, Batch).

    by_kind: the Samples of each kind, 0: the training data, 1: what the model wrote, if used; args: those of
    train_router.py.
    """
    if recipe.step_samples:
        steps = epochs(by_kind[0], recipe.step_samples, args.tokens, args.seed)
    else:
        steps = alternating(by_kind, args.tokens, args.accumulate, args.seed)
    for groups in steps:
        yield [(kind, Batch.of(group, device)) for kind, group in groups]
