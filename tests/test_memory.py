"""Memory of a tuning step, counted on tensors without data, against the estimate that chooses the batch."""
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

import losses
from model import Config, Context, Llama
from recipe import DEFAULT
from router import add_routers, mindskips
from support import memory, parallel
from support.batches import Batch
from support.memory import rows_that_fit, step_bytes, tokens_that_fit

aten = torch.ops.aten
SHAPES = {
    "llama3-8b": Config(32, 32, 8, 4096, 14336, 128256, 128, 8192),
    "llama3.2-1b": Config(16, 32, 8, 2048, 8192, 128256, 64, 8192, tie_embeddings=True),
    "smollm2-135m": Config(30, 9, 3, 576, 1536, 49152, 64, 8192, tie_embeddings=True),
}


class Allocations(TorchDispatchMode):
    """Bytes of all storages alive, now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.storages = WeakIdKeyDictionary()

    def free(self, n):
        self.now -= n

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.storages:
                self.storages[storage] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out


def peak_of_a_step(config, granularity, layers, B, T, monkeypatch, kv="all", dtype=torch.bfloat16):
    """Peak bytes beside the weights, with the attention kernel that CUDA takes."""
    def kernel(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        if attn_mask is not None or q.dtype == torch.float32:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))    # as attention does
            bias = None if attn_mask is None else attn_mask.expand(-1, q.shape[1], -1, -1)
            return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal)[0]
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, False)[0]

    def context(self, idx, lengths=None, prompt_lengths=None):
        cos, sin = self.angles_of(slice(0, T), T)
        return Context(cos=cos, sin=sin, lengths=lengths, host_lengths=[T] * B, prompt_lengths=lengths,
                       longest_prompt=40)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(Llama, "context", context)
    with Allocations() as count, torch.device("meta"):
        model = add_routers(Llama(config).to(dtype), granularity, layers, kv=kv).train()
        for skip in mindskips(model).values():
            skip.router.float()
            skip.estimator = DEFAULT.gate_estimator(0, 10)
        lengths, weights = torch.empty(B, dtype=torch.int64), count.now
        row, column = torch.arange(B).repeat_interleave(T - 40), torch.arange(T - 40).repeat(B)
        batch = Batch(torch.empty(B, T, dtype=torch.int64), lengths, lengths, (row, column), row)
        count.peak = 0
        losses.backward(model, batch, "kl", 1e-3)
    return count.peak - weights


@pytest.mark.parametrize("granularity", ["attn_token", "attn_sequence", "mlp_token", "block_token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_estimate_of_a_steps_memory(shape, granularity, monkeypatch):
    config = SHAPES[shape]
    for layers, n_layers in ("all", config.n_layer), (f"last:{config.n_layer // 2}", config.n_layer // 2):
        peak = peak_of_a_step(config, granularity, layers, 16, 256, monkeypatch)
        assert step_bytes(config, n_layers, 16 * 256, 2, losses.CHUNK["cpu"]) == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked, dtype", [(4096, torch.bfloat16), (4096, torch.float32), (0, torch.float32)])
def test_the_estimate_where_keys_are_repeated(masked, dtype, shape, monkeypatch):
    config, kv = SHAPES[shape], "open" if masked else "all"
    peak = peak_of_a_step(config, "attn_token", "all", 1, 4096, monkeypatch, kv, dtype)
    estimate = step_bytes(config, config.n_layer, 4096, dtype.itemsize, losses.CHUNK["cpu"], masked=masked)
    assert estimate == pytest.approx(peak, rel=0.1)


def test_the_batch_fits_the_card(tiny, monkeypatch):
    """Llama-3-8B keeps 3.8 MiB per token: 16,384 tokens do not fit beside it into 80 GiB."""
    with torch.device("meta"):
        model = Llama(SHAPES["llama3-8b"]).bfloat16()
    assert tokens_that_fit(model, 0, 16384, 128) == 16384                    # no GPU: as asked
    weight = SimpleNamespace(device=torch.device("cuda"), itemsize=2, dtype=torch.bfloat16)
    parameters = []
    on_card = SimpleNamespace(config=model.config, layers=model.layers, embed=SimpleNamespace(weight=weight),
                              parameters=lambda: parameters)
    for free, first, tokens in (61, 0, 8192), (61, 16, 16384), (20, 0, 4096), (0.001, 0, 64):
        n_bytes = int(free * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, n=n_bytes: (n, 80 * 2**30))
        assert tokens_that_fit(on_card, first, 16384, 128) == tokens
        if tokens > 64:
            assert step_bytes(model.config, 32 - first, tokens, 2, 128) < 0.8 * n_bytes

    # with --shard a card's part of the weights, of which the host has all, is still to come
    parameters.append(SimpleNamespace(device=torch.device("cpu"), nbytes=52 * 2**30))
    monkeypatch.setitem(vars(parallel.processes), "world", 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((61 + 26) * 2**30, 200 * 2**30))
    assert tokens_that_fit(on_card, 0, 16384, 128) == 8192
    parameters.clear()                                   # --train all: gradients, moments, a teacher
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((61 + 61) * 2**30, 200 * 2**30))
    assert tokens_that_fit(on_card, 0, 16384, 128, all_train=True) == 8192


def test_what_pytorch_keeps_of_freed_memory_is_free(monkeypatch):
    """A generation leaves its cache and its graph's to PyTorch; the next one may have as many rows."""
    reserved = [30 * 2**30]
    monkeypatch.setattr(torch.cuda, "empty_cache", reserved.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * 2**30 - sum(reserved), 80 * 2**30))
    weight = SimpleNamespace(device=torch.device("cuda"), itemsize=2)
    on_card = SimpleNamespace(config=SHAPES["llama3-8b"], embed=SimpleNamespace(weight=weight))
    row_bytes = 2 * 32 * 8 * 128 * 1000 * 2
    assert rows_that_fit(on_card, 512, 1000) == int(0.8 * 40 * 2**30 / (3 * row_bytes))
    weight.device = torch.device("cpu")
    for free, rows in (8 * 2**30, int(0.8 * 8 * 2**30 / row_bytes)), (10, 1), (None, 512):
        monkeypatch.setattr(memory, "linux_bytes", lambda key, file, free=free: free)
        assert rows_that_fit(on_card, 512, 1000) == rows
    monkeypatch.setattr(memory, "linux_bytes", lambda key, file: 8 * 2**30)
    monkeypatch.setitem(vars(parallel.processes), "world", 2)                # which share the memory
    assert rows_that_fit(on_card, 512, 1000) == int(0.8 * 4 * 2**30 / row_bytes)
