"""What a machine with a GPU has to show, in one run of a few minutes: a block for docs/RESULTS.md.

    python tests/cuda_check.py [--json FOLDER] [--only tests,tables,tuning]

1. the tests that need a GPU, and the kernels' on it
2. bench.py on the shape of Llama-3.1-8B with random weights: prefill and decode after 512, 2,048 and 8,192
   tokens, dense beside routed at half capacity, beside a static drop of half of the attentions
3. router tuning of the same shape on 1,000 samples as long as Alpaca's, with the estimate of its memory
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import losses
from recipe import DEFAULT
from router import add_routers, capacity
from support.batches import Batch, pack
from support.cli import Parser, words
from support.data import Sample
from support.memory import step_bytes, tokens_that_fit
from timing import SHAPES, random_model

failed = []                  # commands
PARTS = ["tests", "tables", "tuning"]
MODEL = "llama3.1-8b"
COLUMNS = ("phase", "batch", "context", "variant", "granularity", "capacity", "ms", "tokens_per_s", "speedup",
           "limit", "efficiency", "of_peak", "peak_bytes", "cache_bytes")
TABLES = ("--context 512,2048,8192 --static 16", "--context 2048 --batch 8 --static 16",
          "--context 2048 --granularity attn_token --kv open", "--phase train --batch 8 --context 512")


def run(*command, seconds):
    """The output of a command from the project's root; printed where it fails, or takes longer."""
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            output = f"{process.communicate()[0]}\nit took more than {seconds} s"
    if process.returncode:
        print(f"FAILED: {' '.join(command)}\n{output[-4000:]}", flush=True)
        failed.append(command)
    return output


def row_of(values):
    return "| " + " | ".join(values) + " |"


def cell(row, key):
    value = row[key]
    if key.endswith("_bytes") and value is not None:
        return f"{value / 2**30:.2f}"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def bench(flags, folder, name):
    """A table of bench.py, in Markdown."""
    path, model = folder / f"{name}.json", MODEL if "train" not in flags else "llama3.2-1b"
    path.unlink(missing_ok=True)
    output = run("bench.py", "--device", "cuda", "--model", model, "--random-weights", "--rounds", "5",
                 "--json", str(path), *flags.split(), seconds=300)
    if not path.exists():
        return print(output)
    table = json.loads(path.read_text())
    print(f"\n`python bench.py --device cuda --model {model} --random-weights {flags}`\n")
    print(row_of([key.replace("_bytes", " GiB").replace("_", " ") for key in COLUMNS]))
    print(row_of(["---"] * len(COLUMNS)))
    for row in table["rows"]:
        print(row_of([cell(row, key) for key in COLUMNS]))
    print(f"\n{', '.join(f'{key} {value}' for key, value in table['machine'].items())}", flush=True)


def samples_like_alpaca(n, vocab_size):
    """Lengths are log-normal, like those of Alpaca's first samples: 180 tokens in the mean, 722 at most."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(n).log_normal_(4.87, 0.84, generator=generator)
    lengths = lengths.clamp(16, 722).int().tolist()
    ids = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    prompts = [min(30, length // 2) for length in lengths]
    return [Sample(row.tolist(), [i >= prompt for i in range(len(row))], prompt)
            for row, prompt in zip(ids.split(lengths), prompts)]


def tune(granularity, n_samples=1000, per_step=64):
    """Seconds of an epoch with our loss: the loop of train_router.py without ramp, penalty and own text."""
    device = torch.device("cuda")
    model = random_model(SHAPES[MODEL], device, torch.bfloat16)
    add_routers(model, granularity).train()
    tokens = tokens_that_fit(model, 0, DEFAULT.tokens_cuda, losses.CHUNK["cuda"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], DEFAULT.lr)
    samples, weights = samples_like_alpaca(n_samples, model.config.vocab_size), torch.cuda.memory_allocated()
    widest = 0
    for start in range(-per_step, n_samples, per_step):           # the first step is a warm-up
        if start == 0:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()
        for group in pack(samples[max(start, 0):max(start, 0) + per_step], tokens):
            batch = Batch.of(group, device)
            widest = max(widest, batch.idx.numel())
            losses.backward(model, batch, "kl", 1e-3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    seconds, n_tokens = time.perf_counter() - begin, sum(len(s.ids) for s in samples)
    peak = torch.cuda.max_memory_allocated() - weights
    estimate = step_bytes(model.config, model.config.n_layer, widest, 2, losses.CHUNK["cuda"])
    print(f"\nTuning {granularity}, {MODEL}: {n_samples} samples, {n_tokens:,} tokens in {seconds:.1f} s,"
          f" {n_tokens / seconds:,.0f} tokens/s; at most {widest} tokens per batch; memory beside the weights"
          f" {peak / 2**30:.1f} GiB, estimated {estimate / 2**30:.1f}; capacity {capacity(model):.2f}",
          flush=True)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("out/cuda"), help="a folder for bench.py's tables")
    parser.add_argument("--only", type=words(PARTS), default=PARTS, help=f"some of {','.join(PARTS)}")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("cuda_check.py: this PyTorch sees no CUDA device; run it on a machine with a GPU")
    args.json.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    print(torch.cuda.get_device_name(), torch.__version__)
    if "tests" in args.only:
        tests = "tests/test_triton_kernels.py", "tests/test_router.py"
        print(run("-m", "pytest", "-q", *tests, "-k", "triton or cuda", seconds=300).strip().split("\n")[-1])
    if "tables" in args.only:
        for i, flags in enumerate(TABLES):
            bench(flags, args.json, str(i))
    if "tuning" in args.only:
        for granularity in "attn_token", "attn_sequence":
            try:
                tune(granularity)
            except torch.OutOfMemoryError as e:
                print(f"FAILED: tuning {granularity}: {str(e).splitlines()[0]}", flush=True)
                failed.append(granularity)
    print(f"\nall of this: {time.perf_counter() - begin:.0f} s")
    if failed:
        sys.exit(f"cuda_check.py: {len(failed)} of its commands failed, see above")


if __name__ == "__main__":
    main()
