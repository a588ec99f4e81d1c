"""Tiny random models in public formats, written by `transformers` and `tokenizers`, not by this project."""
import copy
import json
import math
import os
import random
import sys

import numpy as np
import pytest
import tokenizers
import torch

if "PYTEST_XDIST_WORKER" in os.environ:           # one of several processes, which share the cores
    os.environ["OMP_NUM_THREADS"] = "1"           # of the scripts that a test starts
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"          # before Triton is imported

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import register_flop_formula
from transformers import AutoConfig, AutoModelForCausalLM

import calibration
import recipe
from model import Llama
from router import add_routers, mindskips, save_routers
from support import attention
from support.data import read_samples
from support.kernels import ONEDNN
from support.script import run_script
from tokenizer import Tokenizer
from weights import fetch_smollm2

os.environ["TOKENIZERS_PARALLELISM"] = "false"
OWN_TEXT = recipe.OWN_TEXTS, recipe.OWN_TOKENS       # see few_own_texts
TINY = dict(vocab_size=320, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, rms_norm_eps=1e-5,
            bos_token_id=1, eos_token_id=2)
LLAMA3_ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                   high_freq_factor=4.0, original_max_position_embeddings=64)
FAMILIES = {
    "grouped queries": dict(),
    "one head each": dict(num_key_value_heads=6),
    "Llama 3.1 rope": dict(rope_parameters=LLAMA3_ROPE),
    "tied head": dict(tie_word_embeddings=True),
    "head_dim": dict(head_dim=16),
    "sharded": dict(),
    "Mistral": dict(model_type="mistral", sliding_window=None),
    "Mistral with a window": dict(model_type="mistral", sliding_window=12),
    "Qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "Qwen3": dict(model_type="qwen3", head_dim=16),
    "SmolLM3": dict(model_type="smollm3", no_rope_layers=[1, 0, 1, 0], pad_token_id=0),
    "Phi-3": dict(model_type="phi3", sliding_window=12, pad_token_id=0),
}
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "It's 3 o'clock; they'll've gone by 1234 or 5,678.\n",
    "def f(x):\n    return x ** 2  # naïve café\n\n",
    "user assistant system instruction answer ",
] * 50


@torch.no_grad()
def greedy_continuation(model, prompt, n, **options):
    """A prompt (T,) with its n likeliest next tokens, each by a forward pass over all before it."""
    row = prompt
    for _ in range(n):
        logits = model(row[None], **options)
        row = torch.cat((row, logits[0, -1].argmax()[None]))
    return row


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests run in two processes, where pytest-xdist is installed; those that a file's name chooses, in
    one."""
    if "PYTEST_XDIST_WORKER" in os.environ or config.known_args_namespace.file_or_dir:
        return
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = 2


def write_tiny(folder, name="grouped queries", seed=0):
    """Save a tiny random model of a family; returns transformers' own copy of it."""
    torch.manual_seed(seed)
    keys = TINY | FAMILIES[name]
    config = AutoConfig.for_model(keys.pop("model_type", "llama"), **keys)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:
            p.data.uniform_(0.5, 1.5)  # norms that are all one would hide a swapped norm
    model.save_pretrained(folder, max_shard_size="60KB" if name == "sharded" else "1GB")
    return model


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def train_tokenizer(pattern=None, digits=False, specials=SPECIALS):
    """A small byte-level BPE tokenizer: GPT-2's pattern, SmolLM2's (digits), or one that is given."""
    tok = tokenizers.Tokenizer(models.BPE())
    if pattern:
        tok.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    elif digits:
        tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                     pre_tokenizers.ByteLevel(add_prefix_space=False)])
    else:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(CORPUS, trainer)
    return tok


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny(folder)
    train_tokenizer(digits=True).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The folder of the real default model."""
    return fetch_smollm2()


@pytest.fixture
def router_file(tiny, tmp_path):
    """router_file(granularity) -> a file of routers of layers 1 to 3, about half of whose gates are open."""
    def write(granularity):
        model = add_routers(Llama.from_pretrained(tiny), granularity, "1-3")
        open_gates_at_random(model)
        save_routers(model, tmp_path / "r.safetensors")
        return tmp_path / "r.safetensors"

    return write


@pytest.fixture(autouse=True)
def few_own_texts(monkeypatch):
    """A model writes 96 texts of 128 tokens to learn from, a sixth of OWN_TEXT, which takes seconds."""
    monkeypatch.setattr(recipe, "OWN_TEXTS", 96)
    monkeypatch.setattr(recipe, "OWN_TOKENS", 128)


@pytest.fixture(autouse=True)
def short_calibration(monkeypatch):
    """Calibration reads a third of what it reads else, which takes most of a short run's time."""
    monkeypatch.setattr(recipe, "CALIBRATION_TEXTS", 24)
    monkeypatch.setattr(calibration, "TRAINING_SAMPLES", 8)
    monkeypatch.setattr(calibration, "PROMPTS", 64)


@pytest.fixture
def native_bfloat16(monkeypatch):
    """This CPU takes the paths of one with bfloat16 instructions."""
    monkeypatch.setattr(attention, "NATIVE_BFLOAT16", True)


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers each time."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def write_data(path, n=40):
    """Alpaca lines of several lengths."""
    rows = [{"instruction": f"Say the number {i}", "input": "" if i % 3 else "in words and " + "x " * (i % 7),
             "output": f"It is {i}, and {i * i} is its square." * (1 + i % 4)} for i in range(n)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def arguments(tiny, tmp_path):
    """A short run on the tiny model; anything appended overrides."""
    data = write_data(tmp_path / "data.jsonl")
    return ["--model", tiny, "--data", data, "--out", tmp_path / "out", "--steps", 12, "--tokens", 400,
            "--device", "cpu", "--dtype", "float32", "--capacity", 0.7, "--save-every", 5]


@pytest.fixture
def tok(tiny):
    return Tokenizer.from_pretrained(tiny)


@pytest.fixture
def samples(tok, tmp_path):
    return read_samples(write_data(tmp_path / "d.jsonl"), tok, 512)[0]


def open_gates_at_random(model, scale=0.3):
    """Let about half of the gates be open."""
    for skip in mindskips(model).values():
        skip.router.weight.data.normal_(0, scale)
        if skip.router.bias is not None:
            skip.router.bias.data.zero_()
    return model


def bound(reference, terms):
    """How far apart two computations of `reference` may be, in its own precision, on any CPU.

    terms: how many products each of its sums has. In another order a sum of n products comes out differently
    by sqrt(n) eps of its size, as a rule (Higham, Accuracy and Stability of Numerical Algorithms, 2.8 and
    3.1). A pass of a tiny model is some 30 such sums one after another: independent errors add up to sqrt(30)
    times one, and norms and softmax make them up to 3 times as large, hence 16. With AVX-512, with AVX2 and
    without either the models stay within a quarter of this bound of their float64 copies. What the tests
    guard against is larger by orders, and where it may not be, they look in float64 as well.
    """
    eps = torch.finfo(reference.dtype).eps
    return 16 * eps * terms**0.5 * max(1.0, float(reference.detach().abs().max()))


def in_float64(model):
    """A copy of a model in float64, where rounding hides nothing; its routers stay in float32."""
    return copy.deepcopy(model).double()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) -> (exit status, what it said): a script's main as the command line runs it."""
    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        try:
            run_script("script.py", main)
        except SystemExit as e:
            said = capsys.readouterr()
            if isinstance(e.code, str):
                return 1, e.code
            return e.code or 0, said.err + said.out
        said = capsys.readouterr()
        return 0, said.out

    return run


def is_one_sentence(said):
    """One line that is no traceback: what a user should read after a mistake."""
    return "Traceback" not in said and len(said.strip().splitlines()) == 1 and len(said) > 20


if ONEDNN:
    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def onednn_linear_flops(x_shape, weight_shape, *_, **__):
        return 2 * math.prod(x_shape) * weight_shape[0]
