"""llama.cpp's files, translated to what a Hugging Face folder has: names of tensors, keys of config.json, a
tokenizer.json."""
import math
import re
import reprlib
from pathlib import Path

import numpy as np
import torch

from support.files import Checkpoint, InputError, open_gguf, read_list, read_value, reason

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
# of a text, also where the metadata do not name them
ENDS = "<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(regex):
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return sequence(cut, BYTE_LEVEL | {"use_regex": False})


def llama3_rope(factors, theta):
    """The rope_scaling of Llama 3.1 to 3.3 whose divisors of frequencies are these factors (D/2,), or None;
    see model.rope_frequencies. (transformers knows no other factors.)"""
    factor = max(factors.tolist(), default=1.0)
    turns = 8192 / (2 * math.pi) * theta ** -(torch.arange(len(factors)) / len(factors))
    ramp = ((turns - 1) / 3).clamp(0, 1)         # 3: high_freq_factor - low_freq_factor, 4 - 1
    if factor <= 1 or not torch.allclose(1 / (ramp + (1 - ramp) / factor), factors, rtol=1e-4):
        return None
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}


def begins_with(tokens, i):
    """The post-processor that puts token i before a text; None without one."""
    if i is None:
        return None
    token = tokens[i]
    before, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {"type": "TemplateProcessing", "single": [before, text], "pair": [before, text, second],
            "special_tokens": {token: {"id": token, "ids": [i], "tokens": [token]}}}


GGUF_PRE_TOKENIZERS = {   # as a tokenizer.json says it
    "gpt-2": BYTE_LEVEL, "smollm": sequence({"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    "llama-bpe": split(LLAMA3_SPLIT), "qwen2": split(QWEN2_SPLIT),
}


class GGUF(Checkpoint):
    """A llama.cpp file, dequantized by the `gguf` package and renamed to Hugging Face's names."""

    def __init__(self, path, remedy="get it again"):
        self.path, self.remedy = Path(path), remedy
        part = re.search(r"-\d{5}-of-(\d{5})\.gguf$", self.path.name)
        self.refuse_split(int(part[1]) if part else 1)
        self.meta, tensors = open_gguf(self.path, remedy)
        self.refuse_split(read_value(self.meta, self.path, "split.count", int, 1))
        arch = self.meta.get("general.architecture")
        if arch not in GGUF_ARCHITECTURES:
            raise InputError(f"{self.path}: architecture {reprlib.repr(arch)} is not supported;"
                             f" {', '.join(GGUF_ARCHITECTURES)} are")
        self.stored = {self.rename(t.name): (t, tuple(int(n) for n in reversed(t.shape)))
                       for t in tensors}
        self.config = {hf_key: self.meta[f"{arch}.{key}"] for key, hf_key in GGUF_CONFIG.items()
                       if f"{arch}.{key}" in self.meta}
        self.config.setdefault("num_key_value_heads", self.config.get("num_attention_heads"))
        self.config |= {"model_type": arch, "tie_word_embeddings": "lm_head.weight" not in self.names}
        if "model.embed_tokens.weight" in self.names:
            shape = self.stored["model.embed_tokens.weight"][1]
            self.config["vocab_size"] = shape[0] if shape else 0
        scaling = self.rope_scaling(f"{arch}.rope")
        if scaling:
            self.config["rope_scaling"] = scaling

    def refuse_split(self, n_files):
        if n_files > 1:
            raise InputError(f"{self.path}: one of {n_files} files of a split model; join them with"
                             " `llama-gguf-split --merge FIRST-FILE WHOLE.gguf`")

    def rope_scaling(self, rope):
        """What config.json would say of it, or None. llama.cpp takes a factor without a type as linear."""
        factor = read_value(self.meta, self.path, f"{rope}.scale_linear", float, 0)
        factor = read_value(self.meta, self.path, f"{rope}.scaling.factor", float, factor)
        kind = read_value(self.meta, self.path, f"{rope}.scaling.type", str, "linear")
        if kind != "none" and (kind != "linear" or factor not in (0, 1)):
            return {"rope_type": kind, "factor": factor}
        if "rope_freqs.weight" not in self.names:
            return None
        factors = self.tensor("rope_freqs.weight").flatten()       # divisors of the pairs' frequencies
        del self.stored["rope_freqs.weight"]
        theta = read_value(self.meta, self.path, f"{rope}.freq_base", float, 10000.0)
        return llama3_rope(factors, theta) or {"rope_type": "factors", "factors": factors.tolist()}

    @staticmethod
    def rename(name):
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(.+)", stem)
        if not block:
            return f"{GGUF_TENSORS.get(stem, stem)}.{kind}"
        return f"model.layers.{block[1]}.{GGUF_TENSORS.get(block[2], block[2])}.{kind}"

    def read(self, name):
        import gguf
        t, shape = self.stored[name]
        try:
            with np.errstate(all="ignore"):
                array = gguf.quants.dequantize(t.data, t.tensor_type)
            array = np.array(array, dtype=np.float32).reshape(shape)
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
        where = f"{self.path}: tokenizer.ggml"
        meta = {key.removeprefix("tokenizer.ggml."): value for key, value in self.meta.items()}
        model, pre = meta.get("model"), read_value(meta, where, "pre", str, None)
        if model != "gpt2" or pre not in GGUF_PRE_TOKENIZERS:
            raise InputError(f"{self.path}: its tokenizer, {model!r:.40} with pre-tokenizer {pre!r:.40}, is"
                             " not supported; use a folder with the model's tokenizer.json")
        tokens, merges = (read_list(meta, where, key, str) for key in ("tokens", "merges"))
        token_types = read_list(meta, where, "token_type", int)
        if len(token_types) != len(tokens):
            raise InputError(f"{where}: has {len(tokens)} tokens, but {len(token_types)} token_type")
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": tokens[i], "special": token_type == 3} | plain
                 for i, token_type in enumerate(token_types) if token_type in (3, 4)]  # control, user-defined
        bpe = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
               "ignore_merges": pre == "llama-bpe"}
        ids = {key: read_value(meta, where, f"{key}_token_id", int, None, 0, len(tokens) - 1)
               for key in ("bos", "eos", "eot", "eom")}
        config = {f"{key}_token": tokens[ids[key]] for key in ("bos", "eos") if ids[key] is not None}
        ends = [ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None]
        ends += [i for i, token in enumerate(tokens) if token_types[i] == 3 and token in ENDS]
        config["eos_token_ids"] = list(dict.fromkeys(ends))
        if "tokenizer.chat_template" in meta:
            config["chat_template"] = read_value(meta, self.path, "tokenizer.chat_template", str)
        adds_bos = read_value(meta, where, "add_bos_token", bool, pre == "llama-bpe")
        spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": GGUF_PRE_TOKENIZERS[pre],
                "model": bpe, "decoder": BYTE_LEVEL,
                "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
                "post_processor": begins_with(tokens, ids["bos"]) if adds_bos else None}
        return {"config": config, "json": spec}
