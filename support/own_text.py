"""Text that a model writes, kept in a file: it takes minutes where the machine has no bfloat16."""
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from support import parallel
from support.files import InputError, cache_folder, open_safetensors, write_file
from support.graph import release
from support.memory import rows_that_fit

SHIPPED = Path(__file__).parent.parent / "data" / "own_text.safetensors"      # smollm2-135m, seed 0, bfloat16


def own_text_file(model_name, seed, weights_hash):
    """Where the text of a model is kept: that of the default one ships, others' are in the user's cache, with
    the number of texts and of their tokens added to the name."""
    if model_name == "smollm2-135m" and seed == 0:
        return SHIPPED
    return cache_folder() / "own_text" / f"{weights_hash}-{seed}.safetensors"


def write_text(model, n, n_tokens, seed, path=None):
    """Token ids (n, n_tokens) that the model writes after random first tokens; from the file `path` if it has
    these (see own_text_file), or the beginnings of what ships, else written, and kept there. Several
    processes read and write the same, process 0's."""
    device, n_vocab = model.embed.weight.device, model.config.vocab_size
    if path and path != SHIPPED:
        path = path.with_stem(f"{path.stem}-{n}x{n_tokens}")
    ids = parallel.from_first(read_ids(path) if path else None)
    if ids is not None and path == SHIPPED:
        ids = ids[:n, :n_tokens]
    if ids is not None and ids.shape == (n, n_tokens) and int(ids.max()) < n_vocab:
        return ids.to(device)
    torch.manual_seed(seed)
    n_rows = min(parallel.gathered([rows_that_fit(model, n, n_tokens)]))     # with --shard all work in step
    groups = torch.randint(n_vocab, (n, 1), device=device).split(n_rows)
    with tqdm(total=len(groups) * (n_tokens - 1), desc="the model writes", unit="token", leave=False) as bar:
        def show_step(token):
            bar.update()
        texts = [model.generate(first, n_tokens - 1, temperature=1.0, on_token=show_step) for first in groups]
    model.cache = None
    release(model)
    ids = parallel.from_first(torch.cat(texts)).to(device)
    if path and path != SHIPPED and parallel.is_first():
        with suppress(InputError):           # a cache that cannot be written is done without
            write_file(path, safetensors_bytes({"ids": ids.cpu().int()}))
    return ids


def read_ids(path):
    """Token ids (n, T) of a file, or None where there is none or it is damaged."""
    try:
        ids = open_safetensors(path).get_tensor("ids").long()
    except (InputError, SafetensorError):
        return None
    return ids if ids.dim() == 2 and ids.numel() and int(ids.min()) >= 0 else None
