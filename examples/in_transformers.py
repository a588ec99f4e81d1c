"""Routers inside transformers: a router file on a Hugging Face Llama, for their evaluation and serving tools.

    python examples/in_transformers.py MODEL out/routers.safetensors "The sky is blue because"

MODEL is smollm2-135m, a Hugging Face folder or a hub id. From Python (smollm2-135m is fetch_smollm2() there):

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    handles = attach_routers(model, "out/routers.safetensors", capacity=0.8)      # handle.remove() undoes one

A forward hook on every routed sublayer multiplies what it returns by its gate: the predictions of the routed
model. It saves no time, since the hook runs after the sublayer was computed; and it cannot hide keys, so that
router files with kv "open" are refused. To skip, load the model here: model.py, router.load_routers.
"""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.script import run_script  # isort: skip (must come before torch)

import torch

from router import CHOICES, GATES, threshold_for
from support.checked import check_choices, open_router_file, tensor_of
from support.cli import parse_layers
from support.files import InputError
from weights import fetch_smollm2

SIZES = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size", "n_head": "num_attention_heads",
         "n_kv_head": "num_key_value_heads", "intermediate": "intermediate_size", "vocab_size": "vocab_size"}


def attach_routers(model, path, capacity=None, prompt=None):
    """Attach the routers of a file to a transformers model of the Llama family; returns the hooks' handles.

    capacity: as in load_routers. prompt: how many tokens at the beginning a gate of sequences reads; None:
    the whole first pass, as when generating with a cache. Rows must then be of one length.
    InputError where the file is for another model, or needs more than hooks can do.
    """
    file, meta = open_router_file(path)
    if meta["kv"] == "open":
        raise InputError(f"{path}: kv 'open' hides the keys of closed tokens, which a hook cannot do; load"
                         " the model with model.py instead")
    check_choices(meta, CHOICES, f"{path}: ")
    for ours, theirs in SIZES.items():
        wanted, size = json.loads(meta["model"]).get(ours), getattr(model.config, theirs, None)
        if wanted != size:
            raise InputError(f"{path}: these routers are for a model whose {theirs} is {wanted}, not {size}")
    part, scope = meta["granularity"].split("_")
    threshold = threshold_for(capacity, meta, path)
    generation, hooks = Generation(scope), []
    for i in parse_layers(meta["layers"], model.config.num_hidden_layers):
        layer = model.model.layers[i]
        router = GATES[meta["gate"]](model.config.hidden_size, scope, meta["pool"])
        if any(hasattr(router, name) for name in ("replacement", "merge", "attach")):
            raise InputError(f"{path}: gate {meta['gate']!r} does more than to leave out a sublayer, which"
                             " these hooks do not; load the model with model.py instead")
        for name, tensor in router.state_dict().items():
            tensor.copy_(tensor_of(file, f"layers.{i}.{name}", tensor.shape, path))
        gate = Gate(router.to(next(layer.parameters()).device), threshold, prompt, generation)
        sublayer = {"attn": layer.self_attn, "mlp": layer.mlp, "block": layer}[part]
        hooks.append((sublayer, gate.close_block if part == "block" else gate.close))
    handles = [model.model.register_forward_pre_hook(generation.begin, with_kwargs=True)]
    return handles + [sublayer.register_forward_hook(hook, with_kwargs=True) for sublayer, hook in hooks]


class Generation:
    """Whether a pass continues a text, so that its gates at sequence level are already decided."""

    def __init__(self, scope):
        self.scope, self.goes_on = scope, False

    def begin(self, model, args, kwargs):
        mask = kwargs.get("attention_mask")
        if self.scope == "sequence" and mask is not None and not bool((mask != 0).all()):
            raise InputError("a gate of sequences reads all tokens of a row, padding too; give it rows of one"
                             " length")
        cache = kwargs.get("past_key_values")
        self.goes_on = cache is not None and cache.get_seq_length() > 0


class Gate:
    """One router, its threshold, and, at sequence level, what it decided at the prompt."""

    def __init__(self, router, threshold, prompt, generation):
        self.router, self.threshold, self.prompt, self.generation = router, threshold, prompt, generation
        self.decided = None                                              # of sequences, (B, 1)

    @torch.no_grad()
    def gate(self, h):
        """0 or 1 for each token, (B, T) or (B, 1), from the sublayer's normalized input h (B, T, C)."""
        B, T, _ = h.shape
        by_sequence = self.generation.scope == "sequence"
        if by_sequence and self.generation.goes_on:
            return self.decided
        n = min(T, self.prompt or T)
        ctx = SimpleNamespace(lengths=torch.full((B,), T, device=h.device), longest_prompt=n,
                              prompt_lengths=torch.full((B,), n, device=h.device))
        score = torch.sigmoid(self.router(self.router.pooled(h, ctx)).squeeze(-1))
        gate = score >= self.threshold
        if by_sequence:
            gate = self.decided = gate[:, None]
        return gate

    def close(self, module, args, kwargs, output):
        """Hook of attention or MLP."""
        h = args[0] if args else kwargs["hidden_states"]
        gate = self.gate(h)[..., None].to(h.dtype)                       # (B, T or 1, 1)
        if isinstance(output, tuple):                                    # attention: with its weights
            return output[0] * gate, *output[1:]
        return output * gate

    def close_block(self, layer, args, kwargs, output):
        """Hook of a whole layer: where the gate is 0, its input."""
        x = args[0] if args else kwargs["hidden_states"]
        return torch.where(self.gate(layer.input_layernorm(x))[..., None], output, x)


def main():
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise InputError("transformers is not installed; pip install transformers") from None
    if len(sys.argv) != 4:
        raise InputError("give a model (smollm2-135m, a Hugging Face folder or a hub id), a router"
                         " file and a text")
    name, path, text = sys.argv[1:]
    name = fetch_smollm2() if name == "smollm2-135m" else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
    except Exception as e:                           # whatever another package may run into
        reason = str(e).strip().split("\n")[0]
        raise InputError(f"{name}: transformers cannot load it ({reason})") from None
    ids = tokenizer(text, return_tensors="pt")
    if ids["input_ids"].numel() == 0:
        raise InputError("the text is empty; give some words")
    handles = attach_routers(model, path)
    routed = model.generate(**ids, max_new_tokens=40, do_sample=False)
    for handle in handles:
        handle.remove()
    dense = model.generate(**ids, max_new_tokens=40, do_sample=False)
    print(f"dense: {tokenizer.decode(dense[0])}\nrouted: {tokenizer.decode(routed[0])}")


if __name__ == "__main__":
    run_script("in_transformers.py", main)
