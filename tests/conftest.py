"""Tiny random models in public formats, written by `transformers` and `tokenizers`, not by this project."""

import os
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

os.environ["TOKENIZERS_PARALLELISM"] = "false"
TINY = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.2,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
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
}
CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "It's 3 o'clock; they'll've gone by 1234 or 5,678.\n",
    "def f(x):\n    return x ** 2  # naïve café\n\n",
    "user assistant system instruction answer ",
] * 50


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
    from tokenizers import Regex

    tok = Tokenizer(models.BPE())
    if pattern:
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    elif digits:
        tok.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
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
    from weights import fetch_smollm2

    return fetch_smollm2()


@pytest.fixture
def call(monkeypatch, capsys):
    """call(main, *arguments) -> (exit status, what it said): a script's main as the command line runs it."""
    from train_router import run_script

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
