"""The dense model, against transformers."""
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    FAMILIES,
    LLAMA3_ROPE,
    bound,
    greedy_continuation,
    in_float64,
    is_one_sentence,
    write_tiny,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    SmolLM3Config,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from model import Config, Llama, rope_frequencies
from router import add_routers
from scoring import Prefix
from weights import SMOLLM2_FILE, InputError


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, tmp_path):
    reference = write_tiny(tmp_path, family)
    model = Llama.from_pretrained(tmp_path)
    idx = torch.randint(0, 320, (2, 150))  # beyond the window, and beyond Llama 3.1's original context
    with torch.no_grad():
        expected = reference(idx).logits
        assert (model(idx) - expected).abs().max() < bound(expected, 96)
        (tmp_path / "tokenizer.json").write_text("{}")
        model.save_pretrained(tmp_path / "again", tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(idx).logits, expected)
    if family == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 3


@pytest.mark.parametrize("family, key", [
    ("SmolLM3", "tie_word_embeddings"), ("SmolLM3", "rope_parameters"), ("Phi-3", "rms_norm_eps"),
    ("Phi-3", "sliding_window"), ("Mistral with a window", "sliding_window"), ("Qwen2", "rope_parameters"),
])
def test_what_a_config_leaves_out_is_its_familys_default(family, key, tmp_path, monkeypatch):
    """Files that transformers 4 or a hand wrote lack what equals a default."""
    monkeypatch.setitem(FAMILIES, "SmolLM3", FAMILIES["SmolLM3"] | {"tie_word_embeddings": True})
    write_tiny(tmp_path, family)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    idx = torch.randint(0, 320, (2, 150))
    with torch.no_grad():
        expected = reference(idx).logits
        assert (Llama.from_pretrained(tmp_path)(idx) - expected).abs().max() < bound(expected, 96)


def test_real_model_equals_transformers_reading_the_same_gguf(smollm2):
    reference = AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    idx = torch.randint(0, 49152, (2, 100))
    with torch.no_grad():
        expected = reference(idx).logits
        for name in "smollm2-135m", smollm2 / SMOLLM2_FILE:
            assert (Llama.from_pretrained(name)(idx) - expected).abs().max() < bound(expected, 576)


def test_padding_changes_no_row(tiny):
    model = Llama.from_pretrained(tiny)
    idx, lengths = torch.randint(0, 320, (5, 40)), torch.tensor([40, 7, 23, 1, 39])
    other = torch.where(torch.arange(40) < lengths[:, None], idx, 5)                  # with other padding
    with torch.no_grad():
        for net in model, in_float64(model):
            together, again = net(idx, lengths), net(other, lengths)
            for b, n in enumerate(lengths.tolist()):
                alone = net(idx[b:b + 1, :n])[0]
                assert (together[b, :n] - alone).abs().max() < bound(together, 96)
                assert torch.equal(again[b, :n], together[b, :n])


@pytest.mark.parametrize("family", ["grouped queries", "Mistral with a window"])
def test_generate_equals_recomputing_everything(family, tmp_path):
    write_tiny(tmp_path, family)
    model = Llama.from_pretrained(tmp_path)
    idx, lengths = torch.randint(0, 320, (6, 30)), torch.tensor([30, 4, 17, 30, 1, 29])
    out = model.generate(idx, max_new_tokens=20, lengths=lengths)
    assert out.shape == (6, 50)
    for b, n in enumerate(lengths.tolist()):
        assert torch.equal(out[b, :n + 20], greedy_continuation(model, idx[b, :n], 20))
        assert not out[b, n + 20:].any()


def test_generate_equals_transformers(tiny):
    model, reference = Llama.from_pretrained(tiny), AutoModelForCausalLM.from_pretrained(tiny)
    idx = torch.randint(3, 320, (3, 12))
    expected = reference.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=16,
                                  do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, max_new_tokens=16), expected)


def test_generate_stops_each_row_at_eos(tiny):
    model = Llama.from_pretrained(tiny)
    idx = torch.randint(3, 320, (4, 10))
    free = model.generate(idx, max_new_tokens=24)
    eos = int(free[0, 15])
    out = model.generate(idx, max_new_tokens=24, eos_id=eos)
    assert out.shape == free.shape
    for b in range(4):
        new = free[b, 10:].tolist()
        end = new.index(eos) + 1 if eos in new else 24
        assert out[b, 10:].tolist() == new[:end] + [eos] * (24 - end)


def test_generate_stops_at_any_of_several_ends(tiny):
    model = Llama.from_pretrained(tiny)
    idx = torch.randint(3, 320, (4, 10))
    free = model.generate(idx, max_new_tokens=24)
    ends = [int(free[0, 15]), int(free[1, 12])]
    out = model.generate(idx, max_new_tokens=24, eos_id=ends)
    assert torch.equal(out, model.generate(idx, max_new_tokens=24, eos_id=torch.tensor(ends)))
    for b in range(4):
        new = free[b, 10:].tolist()
        end = min([new.index(i) + 1 for i in ends if i in new], default=24)
        assert out[b, 10:].tolist() == new[:end] + [ends[0]] * (24 - end)


@pytest.mark.parametrize("first", [1000, -1])
def test_an_end_that_is_no_token_of_the_model(first, tiny):
    model, idx = Llama.from_pretrained(tiny), torch.randint(3, 320, (4, 10))
    out = model.generate(idx, max_new_tokens=24)
    end = int(out[0, 12])
    ended = model.generate(idx, max_new_tokens=24, eos_id=[first, end])
    plain = model.generate(idx, max_new_tokens=24, eos_id=end)
    is_padding = ended == first
    assert is_padding[0, 13:].all() and (plain[is_padding] == end).all()
    assert torch.equal(ended[~is_padding], plain[~is_padding])


def test_a_folder_is_written_as_it_was_read(tiny, tmp_path):
    model = Llama.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "m", tiny)
    again = Llama.from_pretrained(tmp_path / "m")
    for (name, p), (same, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == same and torch.equal(p, q)
    assert not {"hidden_size"} & json.loads((tmp_path / "m" / "tokenizer_config.json").read_text()).keys()
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with torch.no_grad():
        idx = torch.arange(20)[None]
        expected = reference(idx).logits
        assert (model(idx) - expected).abs().max() < bound(expected, 96)
    for granularity in "attn_token", "block_token":
        with pytest.raises(InputError, match=r"layers\.0\..* has no place .*remove_routers"):
            add_routers(model, granularity).save_pretrained(tmp_path / "routed", tiny)


def test_sampling(tiny):
    model = Llama.from_pretrained(tiny)
    idx = torch.randint(3, 320, (1, 10)).expand(400, 10)
    greedy = model.generate(idx[:1], max_new_tokens=4)
    assert torch.equal(model.generate(idx[:1], max_new_tokens=4, temperature=0.7, top_k=1), greedy)
    drawn = model.generate(idx, max_new_tokens=1, temperature=2.0, top_k=3)[:, -1]
    with torch.no_grad():
        logits, likeliest = model(idx[:1])[0, -1].topk(3)
    share = (drawn[:, None] == likeliest).float().mean(0)
    assert share.sum() == 1
    assert (share - (logits / 2).softmax(0)).abs().max() < 0.1


def test_cache_takes_the_bytes_it_says(tiny):
    model = Llama.from_pretrained(tiny)
    model.generate(torch.ones(3, 10, dtype=torch.int64), max_new_tokens=6)
    assert model.cache.bytes() == 2 * 4 * 3 * 2 * 16 * 8 * 4  # k and v, layers, rows, ..., bytes


def test_out_of_memory_names_the_cache_and_what_to_lower(tiny, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = Llama.from_pretrained(tiny)
    monkeypatch.setattr(torch.Tensor, "new_empty", no_memory)
    with pytest.raises(InputError, match=r"3 rows of 40 tokens need 0\.00 GiB; lower the batch"):
        model.generate(torch.ones(3, 10, dtype=torch.int64), max_new_tokens=30)


@pytest.mark.parametrize("why", ["device-side assert triggered", "an illegal memory access was encountered"])
def test_an_error_of_an_earlier_kernel_is_not_called_a_lack_of_memory(why, tiny, monkeypatch):
    """CUDA tells of it at the next call, whichever that is."""
    def earlier_error(*_):
        raise RuntimeError(f"CUDA error: {why}")

    model = Llama.from_pretrained(tiny)
    monkeypatch.setattr(torch.Tensor, "new_empty", earlier_error)
    with pytest.raises(RuntimeError, match=why):
        model.generate(torch.ones(3, 10, dtype=torch.int64), max_new_tokens=30)


@pytest.mark.parametrize("what, arguments", [
    ("empty", dict(idx=torch.zeros(1, 0, dtype=torch.int64))),
    ("empty", dict(idx=torch.zeros(0, 5, dtype=torch.int64))),
    ("context", dict(idx=torch.zeros(1, 500, dtype=torch.int64), max_new_tokens=13)),
    ("max_new_tokens", dict(idx=torch.zeros(1, 5, dtype=torch.int64), max_new_tokens=0)),
    ("temperature", dict(idx=torch.zeros(1, 5, dtype=torch.int64), temperature=-1.0)),
    ("temperature", dict(idx=torch.zeros(1, 5, dtype=torch.int64), temperature=math.nan)),
    ("top_k", dict(idx=torch.zeros(1, 5, dtype=torch.int64), temperature=1.0, top_k=-1)),
    ("lengths", dict(idx=torch.zeros(2, 5, dtype=torch.int64), lengths=torch.tensor([5, 6]))),
    ("lengths", dict(idx=torch.zeros(2, 5, dtype=torch.int64), lengths=torch.tensor([5]))),
])
def test_generate_refuses(what, arguments, tiny):
    with pytest.raises(InputError, match=what):
        Llama.from_pretrained(tiny).generate(**arguments)


def test_forward_refuses_more_than_the_context(tiny):
    with pytest.raises(InputError, match="context of 512"):
        Llama.from_pretrained(tiny)(torch.zeros(1, 513, dtype=torch.int64))


@pytest.mark.parametrize("key, value, named", [
    ("model_type", "gpt_neox", "gpt_neox"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "yarn"),
    ("attention_bias", True, "attention_bias"),
    ("partial_rotary_factor", 0.75, "partial_rotary_factor"),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.75}, "partial"),
    ("hidden_act", "gelu", "gelu"), ("is_causal", False, "is_causal"),
    ("no_rope_layers", [1, 0], "no_rope_layers has 2 entries for 4 layers"),
    ("hidden_size", None, "hidden_size"),
    ("intermediate_size", 64, r"gate_proj.*\(96, 48\).*\(64, 48\)"),
    ("num_hidden_layers", 3, r"layers\.3\."),
    ("num_hidden_layers", 5, r"layers\.4\..*missing"),
])
def test_config_that_does_not_fit_is_refused_by_name(key, value, named, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config[key] = value
    if key == "no_rope_layers":
        config["model_type"] = "smollm3"
    if value is None:
        del config[key]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=named):
        Llama.from_pretrained(tmp_path / "m")


def test_older_config_spelling(tiny):
    """transformers 4 wrote rope_theta and rope_scaling where 5 writes rope_parameters."""
    old = dict(model_type="llama", num_hidden_layers=1, num_attention_heads=2, hidden_size=8, vocab_size=9,
               intermediate_size=8, rope_theta=5e5,
               rope_scaling=dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                 original_max_position_embeddings=8192))
    config = Config.from_hf(old)
    assert config.rope_theta == 5e5 and config.rope_scaling["factor"] == 8.0 and config.n_kv_head == 2


LLAMA31_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                "original_max_position_embeddings": 8192}
KEYS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
        "vocab_size", "max_position_embeddings")
PUBLIC = {  # what their config.json say, as far as it concerns a loader
    "Llama 2 7B": ((4096, 11008, 32, 32, 32, 32000, 4096), {"rope_scaling": None}),
    "Llama 3 8B": ((4096, 14336, 32, 32, 8, 128256, 8192), {"rope_theta": 5e5, "attention_bias": False}),
    "Llama 3.1 8B": ((4096, 14336, 32, 32, 8, 128256, 131072), {
        "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE}),
    "Llama 3.2 1B": ((2048, 8192, 32, 16, 8, 128256, 131072), {
        "rope_theta": 5e5, "rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "head_dim": 64,
        "tie_word_embeddings": True}),
    "TinyLlama": ((2048, 5632, 32, 22, 4, 32000, 2048), {"rope_scaling": None}),
    "Mistral 7B v0.1": ((4096, 14336, 32, 32, 8, 32000, 32768), {"rope_theta": 1e4, "sliding_window": 4096}),
    "SmolLM3 3B": ((2048, 11008, 16, 36, 4, 128256, 65536), {
        "rope_theta": 5e6, "no_rope_layers": [1, 1, 1, 0] * 9, "sliding_window": None,
        "tie_word_embeddings": True}),
    "Phi-4": ((5120, 17920, 40, 40, 10, 100352, 16384), {
        "rope_theta": 25e4, "sliding_window": None, "partial_rotary_factor": 1.0, "rope_scaling": None}),
}
TYPES = {"Mistral": ("mistral", MistralConfig), "SmolLM3": ("smollm3", SmolLM3Config),
         "Phi-4": ("phi3", Phi3Config)}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configs_old_and_new_spelling(name):
    family, their_config = TYPES.get(name.split()[0], ("llama", LlamaConfig))
    keys = dict(zip(KEYS, PUBLIC[name][0])) | {"rms_norm_eps": 1e-5} | PUBLIC[name][1]
    ours = Config.from_hf({"model_type": family, **keys})
    theirs = their_config(**keys)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.n_layer, ours.n_embd, ours.max_context) == (
        theirs.num_hidden_layers, theirs.hidden_size, theirs.max_position_embeddings)
    again = Config.from_hf(theirs.to_dict())
    same = {"rope_scaling": None}
    assert replace(again, **same) == replace(ours, **same)
    assert (rope_frequencies(again) == rope_frequencies(ours)).all()
    kind = theirs.rope_parameters["rope_type"]
    if kind == "llama3":
        expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
        assert torch.allclose(rope_frequencies(ours), expected, rtol=1e-6, atol=0)


def test_loading_in_bfloat16(tiny):
    model = Llama.from_pretrained(tiny, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    with torch.no_grad():
        exact = Llama.from_pretrained(tiny)(torch.arange(20)[None])
        assert (model(torch.arange(20)[None]).float() - exact).norm() < 0.05 * exact.norm()


def test_loading_and_generating_import_no_compiler(tiny):
    """Which the meta device does where it initializes or copies, in seconds."""
    program = ("import sys, torch; from model import Llama; from router import add_routers\n"
               "add_routers(Llama.from_pretrained(sys.argv[1])).generate(torch.tensor([[1, 2]]), 3)\n"
               "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", program, tiny], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout == "[]\n", done.stderr


# ----------------------------------------------------------------------------------------------- tied weights


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {   # what the file of a model has whose config says that its head is tied
    "only the head": lambda embed: {HEAD: embed},
    "both, equal": lambda embed: {EMBED: embed, HEAD: embed.clone()},
    "both, different": lambda embed: {EMBED: embed, HEAD: torch.randn_like(embed)},
    "both, one number different": lambda embed: {EMBED: embed, HEAD: embed + torch.eye(*embed.shape)},
    "both, the head rounded": lambda embed: {EMBED: embed, HEAD: embed.bfloat16()},
}


@pytest.mark.parametrize("case", TIED)
def test_tied_weights_are_what_transformers_makes_of_them(case, tiny, tmp_path):
    folder = tmp_path / "m"
    write_tiny(folder, "tied head")
    shutil.copy(tiny / "tokenizer.json", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= TIED[case](tensors.pop(EMBED))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    reference, model = AutoModelForCausalLM.from_pretrained(folder), Llama.from_pretrained(folder)
    is_tied = reference.lm_head.weight is reference.model.embed_tokens.weight
    assert (model.head.weight is model.embed.weight) == is_tied == (case in ("only the head", "both, equal"))
    model.save_pretrained(tmp_path / "again", folder)
    idx = torch.randint(0, 320, (2, 50))
    with torch.no_grad():
        expected = reference(idx).logits
        for net in model, Llama.from_pretrained(tmp_path / "again"):
            assert (net(idx) - expected).abs().max() < bound(expected, 96)


@pytest.mark.parametrize("missing", [EMBED, HEAD])
def test_an_untied_model_needs_both(missing, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    tensors = load_file(tiny / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(InputError, match=f"{missing} is missing"):
        Llama.from_pretrained(tmp_path / "m")


# -------------------------------------------------------------------------------------------------- token ids


@pytest.mark.parametrize("token", [320, -1, 10**12, -2**63])
def test_a_token_that_the_model_does_not_have(token, tiny):
    model, idx = Llama.from_pretrained(tiny), torch.randint(0, 320, (2, 9))
    idx[1, 4] = token
    lengths = torch.tensor([9, 2])                      # in padding too
    beginning = lambda idx: Prefix(model, idx[1].tolist())
    for use in model, model.generate, lambda idx: model(idx, lengths), beginning:
        with pytest.raises(InputError, match=rf"token id {token} .* 320") as e:
            use(idx)
        assert is_one_sentence(str(e.value))


# ------------------------------------------------------------------------------------------- values of config


def edited(tiny, folder, **changes):
    """A copy of the tiny folder with other keys in its config.json."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


PLAIN_ROPE = dict(rope_type="default", rope_theta=5e5)
ROPE_WITHOUT_THETA = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
ROPES = {
    "both": dict(rope_parameters=PLAIN_ROPE, rope_scaling=LLAMA3_ROPE),
    "theta beside them": dict(rope_parameters=PLAIN_ROPE, rope_theta=3e4,
                              rope_scaling=ROPE_WITHOUT_THETA),
    "theta in one that is not taken": dict(rope_parameters=PLAIN_ROPE,
                                           rope_scaling=ROPE_WITHOUT_THETA),
    "scaling that is plain": dict(rope_parameters=LLAMA3_ROPE, rope_scaling=dict(rope_type="default")),
    "empty scaling": dict(rope_parameters=LLAMA3_ROPE, rope_scaling={}),
    "null": dict(rope_parameters=None, rope_scaling=None, rope_theta=7e3),
    "old name of the type": dict(rope_parameters=None, rope_scaling=dict(type="llama3") | {
        key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if key != "rope_type"}),
    "old name beside the new": dict(rope_parameters=LLAMA3_ROPE | dict(type="yarn")),
}


@pytest.mark.parametrize("case", ROPES)
def test_rope_is_what_transformers_makes_of_it(case, tiny, tmp_path):
    folder = edited(tiny, tmp_path / "m", **ROPES[case])
    reference, model = AutoModelForCausalLM.from_pretrained(folder), Llama.from_pretrained(folder)
    assert model.config.rope_theta == AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"]
    idx = torch.randint(0, 320, (2, 150))
    with torch.no_grad():
        expected = reference(idx).logits
        assert (model(idx) - expected).abs().max() < bound(expected, 96)


def with_rope(**changes):
    """LLAMA3_ROPE with other values; None takes one out."""
    return {key: value for key, value in (LLAMA3_ROPE | changes).items() if value is not None}


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope, named", [
    *((with_rope(rope_type=kind), kind) for kind in ("yarn", "linear", "dynamic", "longrope", "su", "mrope")),
    *((with_rope(**{name: value}), name) for name in ("factor", "low_freq_factor", "high_freq_factor",
                                                      "original_max_position_embeddings")
      for value in (None, "8", True, 0, -1.0, float("nan"), float("inf"), [8.0])),
    *((with_rope(rope_theta=value), "rope_theta") for value in ("5e5", 0, -1, float("inf"), 1e40, False)),
    (with_rope(high_freq_factor=1.0), "low_freq_factor"), (with_rope(low_freq_factor=5.0), "low_freq_factor"),
    (dict(full_attention=PLAIN_ROPE, sliding_attention=PLAIN_ROPE), "per layer type"),
    (PLAIN_ROPE | dict(full_attention=PLAIN_ROPE), "per layer type"), (with_rope(rope_type=3), "rope_type"),
    ("llama3", "rope_"), ([LLAMA3_ROPE], "rope_"), (dict(rope_type="factors"), "factors"),
    (dict(rope_type="factors", factors=[1.0] * 3), "factors"),
    (dict(rope_type="factors", factors=[0.0] * 4), "factors"),
])
def test_rope_that_is_not_supported_is_named_where_the_model_is_opened(key, rope, named, tiny):
    hf = json.loads((tiny / "config.json").read_text()) | {key: rope}
    with pytest.raises(InputError, match=named):
        Config.from_hf(hf)


SIZES = *KEYS, "head_dim"
WRONG_SIZES = "48", -1, 0, 10**12, 10**20, 2.0, True, [1], {}, float("nan")


@pytest.mark.parametrize("key, value", [
    *((key, value) for key in SIZES for value in WRONG_SIZES),
    *(("rms_norm_eps", value) for value in ("1e-5", 0, -1e-5, 10**12, float("nan"), float("inf"), True)),
    *(("rope_theta", value) for value in ("1e4", 0, -1, float("nan"))),
    *((key, value) for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")
      for value in ("false", "true", 1, [])),
    ("num_hidden_layers", 100_000), ("model_type", ["llama"]), ("model_type", None), ("hidden_act", 3),
    ("num_key_value_heads", 4), ("num_key_value_heads", 12), ("head_dim", 7), ("quantization_config", "gptq"),
])
def test_config_values_of_wrong_kinds_or_ranges(key, value, tiny, tmp_path):
    changes = {"rope_parameters": None, key: value}
    with pytest.raises(InputError, match=key) as e:
        Llama.from_pretrained(edited(tiny, tmp_path / "m", **changes))
    assert is_one_sentence(str(e.value))


@pytest.mark.parametrize("sizes", [
    dict(hidden_size=2**20, head_dim=8), dict(intermediate_size=2**24), dict(vocab_size=2**24),
    dict(vocab_size=321), dict(num_hidden_layers=1000), dict(num_attention_heads=4096, head_dim=4096),
    dict(num_attention_heads=12),
])
def test_sizes_that_the_tensors_do_not_have_take_no_memory(sizes, tiny, tmp_path, monkeypatch):
    empty, folder = torch.empty, edited(tiny, tmp_path / "m", **sizes)
    with torch.device("meta"):
        torch.empty(1)                   # PyTorch notes at the first use which functions the device is for

    def only_meta(*shape, device=None, **more):
        assert str(device or "meta") == "meta", "memory is taken before the sizes are compared"
        return empty(*shape, device=device, **more)

    monkeypatch.setattr(torch, "empty", only_meta)
    with pytest.raises(InputError, match="but the config asks for|is missing"):
        Llama.from_pretrained(folder)
