"""Generate text with the dense model and, with --routers, the routed one; then draw what was skipped.

    python sample.py "Why is the sky blue?"
    python sample.py "Why is the sky blue?" --routers routers/smollm2-135m.attn_token.safetensors
"""
from support.script import run_script  # isort: skip (must come before torch)

import shutil
import sys
import time

import torch

from model import Llama
from router import capacity, dense, load_routers, trace
from support.cli import common_arguments, number
from support.cuda import plain_kernels
from support.files import InputError
from support.machine import device_and_dtype
from support.run import warn_if_unfinished
from tokenizer import Tokenizer


def generate(model, tok, ids, args):
    """Stream a continuation of ids (1, T) to the terminal; returns its token ids."""
    new, shown = [], 0

    def show(token):
        nonlocal shown
        new.append(int(token))
        text = tok.decode(i for i in new if i not in tok.eos_ids).rstrip("\ufffd")    # half a character waits
        print(text[shown:], end="", flush=True)
        shown = len(text)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    model.generate(ids, args.max_new_tokens, args.temperature, args.top_k, eos_id=tok.eos_ids, on_token=show)
    seconds = time.perf_counter() - start
    print(f"\n\n{len(new)} tokens in {seconds:.2f} s, cache {model.cache.bytes() / 2**20:.2f} MiB\n")
    return new


def show_layers(decisions, n_layer):
    """What ran at sequence level, one mark per layer. decisions: see router.trace."""
    print("layers 0 to", n_layer - 1, "for this prompt (█ ran, · skipped, = has no router)\n")
    marks = ["="] * n_layer
    for i, (is_open, *_) in decisions.items():
        marks[i] = "█" if is_open else "·"
    print("".join(marks))


def show_map(decisions, n_layer, prompt, width):
    """What ran at token level, a map of layers and tokens, of which the first `prompt` are the prompt's."""
    rows = {i: torch.cat([is_open[0] for is_open in passes]).tolist() for i, passes in decisions.items()}
    tokens = len(next(iter(rows.values())))
    print(f"layers (down) and tokens (across), the first {prompt} the prompt's (█ ran, · skipped)")
    for start in range(0, tokens, width):
        columns = range(start, min(start + width, tokens))
        print("\n     " + "".join("p" if t < prompt else "n" for t in columns))
        for i in range(n_layer):
            print(f"{i:4d} " + "".join("█" if i not in rows or rows[i][t] else "·" for t in columns))


def show_shaded(tok, ids, decisions, n_layer):
    """The text once more, shaded: the fewer of the n_layer layers a token ran, the darker it is (24 ANSI
    greys). The last token that was written never ran, and has no shade."""
    by_layer = [torch.cat([is_open[0] for is_open in passes]) for passes in decisions.values()]
    ran = torch.stack(by_layer).sum(0)                                                         # (tokens,)
    share = (ran + n_layer - len(decisions)) / n_layer
    shown = ""
    for n, token_share in enumerate(share.tolist(), 1):
        text = tok.decode(ids[:n]).rstrip("\ufffd")
        grey = 232 + round(23 * token_share)                       # ANSI 232, black, to 255, white
        ink = 231 if token_share < 0.5 else 16                     # white on dark, black on light
        print(f"\033[48;5;{grey}m\033[38;5;{ink}m{text[len(shown):]}\033[0m", end="")
        shown = text
    print(tok.decode(ids)[len(shown):] + "\n")


def main():
    p = common_arguments(__doc__)
    p.add_argument("prompt", nargs="?", default="Why is the sky blue?")
    p.add_argument("--routers", help="a file that train_router.py wrote")
    p.add_argument("--capacity", type=number(float, 0, 1),
                   help="overall; default: what the routers were tuned for")
    p.add_argument("--max-new-tokens", type=number(int, 1), default=80)
    p.add_argument("--temperature", type=number(float, 0, 1e6), default=0.0,
                   help="0: always the likeliest token")
    p.add_argument("--top-k", type=number(int, 1))
    p.add_argument("--plain", action="store_true", help="continue the prompt as text, not as a chat")
    args = p.parse_args()
    if args.capacity is not None and not args.routers:
        raise InputError("--capacity needs --routers, whose decisions it changes")
    if args.top_k and not args.temperature:
        raise InputError("--top-k: at --temperature 0 the likeliest token is taken; give a temperature, too")
    device, dtype = device_and_dtype(args.device, args.dtype)
    tok = Tokenizer.from_pretrained(args.model)
    model = Llama.from_pretrained(args.model, device, dtype)
    if args.routers:
        meta = load_routers(model, args.routers, args.capacity)
        warn_if_unfinished(args.routers, meta)
    if args.plain or not args.prompt:
        ids = tok.bos_ids + tok.encode(args.prompt, special=False)
    else:
        ids, _ = tok.encode_chat([{"role": "user", "content": args.prompt}])
    if not ids:
        raise InputError("the prompt is empty; give some text")
    ids = torch.tensor([ids], dtype=torch.int64, device=device)

    print(f"{args.prompt}\n\n--- dense")
    with dense(model), plain_kernels():              # tracing needs plain kernels: the same for both
        generate(model, tok, ids, args)
    if args.routers:
        full = model.cache.bytes()
        print("--- routed")
        with trace(model) as decisions, plain_kernels():
            new = generate(model, tok, ids, args)
        n_layer = model.config.n_layer
        if meta["granularity"].endswith("sequence"):
            show_layers(decisions, n_layer)
        else:
            if sys.stdout.isatty():
                show_shaded(tok, ids[0].tolist() + new, decisions, n_layer)
            show_map(decisions, n_layer, ids.shape[1], max(1, shutil.get_terminal_size().columns - 6))
        share = model.cache.bytes() / full
        print(f"\noverall capacity {capacity(model):.3f}, where there is a router"
              f" {capacity(model, routed=True):.3f}; cache {share:.3f} of the dense model's")


if __name__ == "__main__":
    run_script("sample.py", main)
