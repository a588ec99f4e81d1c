"""A run in a folder: which of its steps remain, its log, its checkpoint, and how Ctrl-C ends it."""
import json
import math
import signal
import sys
from pathlib import Path

from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from weights import InputError, open_safetensors, write_file


def check_output(model, out):
    """Refuse a folder `out` in which a run would write over the model that it reads."""
    source, target = Path(model).expanduser().resolve(), Path(out).resolve()
    if source in (target, target / "model"):
        raise InputError(f"--out {out}: the run would write over its model, {model}; choose another folder")


class Run:
    """A folder, args.out, with metrics.jsonl and checkpoint.safetensors.

        for step in run.steps():            # from 0, or with --resume from run.start, on run.checkpoint
            ...
            run.log(step, loss=..., capacity=...)
            if run.is_due(step):
                run.save(step, tensors)

    args: those of train_router.py; save_result: called without arguments before each checkpoint is written.
    InputError where the folder cannot be written, or its checkpoint is of a run with other arguments.
    """

    SAME_ON_RESUME = ("model", "dtype", "seed", "data", "granularity", "layers", "capacity", "recipe", "gate",
                      "train", "loss", "method", "steps", "lr", "penalty", "tokens", "accumulate", "pool",
                      "held_out")

    def __init__(self, args, save_result):
        self.args, self.save_result, self.out, self.n_steps = args, save_result, Path(args.out), args.steps
        self.metrics, self.path = self.out / "metrics.jsonl", self.out / "checkpoint.safetensors"
        self.start, self.checkpoint, self.stopped, lines = 0, None, False, []
        if args.resume:
            self.load()
            lines = self.metrics.read_bytes().splitlines(keepends=True) if self.metrics.exists() else []
        write_file(self.metrics, b"".join(lines[:self.start]))

    def arguments(self):
        return {key: str(getattr(self.args, key)) for key in self.SAME_ON_RESUME}

    def load(self):
        if not self.path.exists():
            raise InputError(f"--resume: there is no {self.path}; run without --resume")
        file = open_safetensors(self.path)
        meta = file.metadata() or {}
        if not {"step", "arguments"} <= meta.keys():
            raise InputError(f"{self.path}: not a checkpoint of train_router.py")
        saved = json.loads(meta["arguments"])
        for key, value in self.arguments().items():
            if saved.get(key) != value:
                flag = "--" + key.replace("_", "-")
                raise InputError(f"--resume: {self.path} was made with {flag} {saved.get(key)}, now it is"
                                 f" {value}; give the same, or start afresh without --resume")
        self.start = int(meta["step"])
        self.checkpoint = {key: file.get_tensor(key) for key in file.keys()}

    def save(self, step, tensors):
        meta = {"step": str(step + 1), "arguments": json.dumps(self.arguments())}
        tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
        self.save_result()
        write_file(self.path, safetensors_bytes(tensors, metadata=meta))

    def is_due(self, step):
        """Whether a step's result is to be saved: every few steps, at the end, and before the run stops."""
        return self.stopped or step + 1 == self.n_steps or (step + 1) % self.args.save_every == 0

    def steps(self):
        """The steps that remain. After Ctrl-C the running step is finished and saved, and the run ends."""
        def stop(*_):
            self.stopped = True
        signal.signal(signal.SIGINT, stop)
        self.bar = tqdm(range(self.start, self.n_steps), initial=self.start, total=self.n_steps, unit="step")
        for step in self.bar:
            yield step
            if self.stopped:
                self.bar.close()
                print(f"stopped after step {step + 1} of {self.n_steps}, saved in {self.out}; --resume goes"
                      " on", file=sys.stderr)
                sys.exit(130)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check_finite(self, step, loss):
        if not math.isfinite(loss):
            raise InputError(f"step {step}: the loss is {loss}; the last checkpoint in {self.out} is kept;"
                             " lower --lr or use --dtype float32")

    def log(self, step, **numbers):
        """Append a line to metrics.jsonl; numbers has at least loss and capacity, which the bar shows."""
        try:
            with open(self.metrics, "a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as e:
            raise InputError(f"{self.metrics}: cannot be written ({e.strerror}); the last checkpoint is"
                             " kept") from None
        self.bar.set_postfix(loss=f"{numbers['loss']:.3f}", capacity=f"{numbers['capacity']:.3f}")
