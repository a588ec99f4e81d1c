"""A run in a folder: which of its steps remain, its log, its checkpoint, and how Ctrl-C ends it. Of several
processes the first writes; with --resume all read the checkpoint, on a file system that they share."""
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from tqdm import tqdm

from support import parallel
from support.checked import json_of, number_of, tensor_of
from support.files import InputError, check_destinations, lock, open_safetensors, write_file

FILES = "metrics.jsonl", "checkpoint.safetensors", "routers.safetensors"
SAME_ON_RESUME = ("model", "dtype", "seed", "data", "data_weights", "piece", "init", "granularity", "layers",
                  "capacity", "recipe", "gate", "train", "loss", "method", "steps", "lr", "model_lr",
                  "penalty", "clip", "tokens", "accumulate", "pool", "kv", "held_out")


def check_output(model, out, init=None):
    """Refuse a folder `out` that cannot be written, or in which a run would write over what it reads: its
    model, or the router file that it begins with."""
    target = Path(os.path.realpath(out))
    source = os.path.realpath(os.path.expanduser(model))
    if source in (str(target), os.path.realpath(target / "model")):
        raise InputError(f"--out {out}: the run would write over its model, {model}; choose another folder")
    if init and os.path.realpath(init) == os.path.realpath(target / "routers.safetensors"):
        raise InputError(f"--out {out}: the run would write over the routers that it reads, {init}; give"
                         " another --out")
    check_destinations(*(target / name for name in (*FILES, "model/config.json")))


def weights_hash(model):
    """A hash of a model's configuration and of 256 numbers of each of its tensors."""
    weights = hashlib.sha256(repr(model.config).encode())
    for name, weight in model.named_parameters():
        at = torch.arange(256, dtype=torch.float64) * 0.6180339887498949 % 1     # golden ratio: evenly spread
        numbers = weight.detach().flatten()[(at * weight.numel()).long().to(weight.device)]
        weights.update(f"{name} {tuple(weight.shape)}".encode())
        weights.update(numbers.float().cpu().numpy().tobytes())
    return weights.hexdigest()[:16]


def file_hash(path):
    try:
        return hash_of([Path(path).read_bytes()])
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror}); give the path of a file") from None


def hash_of(parts):
    """A hash of bytes that come in parts."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()[:16]


def check_same_data(*lists):
    """Refuse processes that have read different questions or samples."""
    if parallel.processes.world > 1:
        parallel.check_same({"data of hash": hash_of(repr(item).encode() for item in chain(*lists))})


def warn_if_unfinished(path, meta):
    """Say so where the run that wrote a router file has not finished; meta: the file's."""
    if "command" in meta and "held_out" not in meta:
        print(f"{path}: its run has not finished, and its threshold is not calibrated", file=sys.stderr)


def routers_entry(path, meta):
    """What a JSON file of results says of a router file, given its metadata."""
    return {"granularity": meta["granularity"], "kv": meta["kv"], "file": str(path), "hash": file_hash(path)}


def settings_of(args, model, samples):
    """{what: its value, text}: everything that determines a run's numbers, for --resume to compare.

    The hash of the data reads all token ids; for that of the weights see weights_hash.
    """
    config = model.config
    data = (np.array([sample.prompt, len(sample.ids), *sample.ids, *sample.answer]) for sample in samples)
    on_cpu = model.embed.weight.device.type == "cpu"
    flags = {}
    for key in SAME_ON_RESUME:
        value = getattr(args, key)
        value = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        flags["--" + key.replace("_", "-")] = value
    return flags | {
        "a model of shape": f"{config.n_layer} x {config.n_embd}, {config.vocab_size} tokens",
        "the device": model.embed.weight.device.type, "numbers of type": str(model.embed.weight.dtype),
        "threads (OMP_NUM_THREADS)": str(torch.get_num_threads() if on_cpu else "any"),
        "weights of hash": weights_hash(model), "data of hash": hash_of(part.tobytes() for part in data)}


class Run:
    """A folder, args.out, with metrics.jsonl and checkpoint.safetensors, locked while the run lasts.

        for step in run.steps():            # from 0, or with --resume from run.start, on run.checkpoint
            ...
            run.log(step, loss=..., capacity=...)
            if run.is_due(step):
                run.save(step, tensors)

    args: those of train_router.py; settings: see settings_of, their hash is the run's id; save_result: called
    without arguments after each checkpoint is written. A finished run in the folder, whose router file says
    what it gave on held-out text, is replaced. InputError where the folder cannot be written, is another
    run's, or has a checkpoint of a run that is not finished or, with --resume, of one with other settings;
    and where it has a model, which only a run with --train all replaces.
    """

    def __init__(self, args, settings, save_result):
        self.args, self.settings, self.save_result = args, settings, save_result
        self.out, self.n_steps, self.stopped = Path(args.out), args.steps, 0
        self.metrics, self.path, self.routers = (self.out / name for name in FILES)
        self.id = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        self.start, self.checkpoint, self.signal = 0, None, 0
        self.constants, self.later_steps = {}, 0     # the latter: what follows the steps, in steps
        if args.resume and not self.path.exists():
            raise InputError(f"--resume: there is no {self.path}; run without --resume")
        self.file = self.open_metrics()
        self.remove_temporaries()
        if args.resume:
            self.load()
        elif self.path.exists() and not self.is_finished():
            raise InputError(f"--out {args.out}: holds a run that is not finished; go on with --resume, or"
                             " give another --out")
        elif args.train != "all" and (self.out / "model" / "config.json").exists():
            raise InputError(f"--out {args.out}: holds a model, as runs with --train all leave one, to which"
                             " new routers would not belong; move its folder away, or give another --out")
        self.lines = self.lines_to_keep()

    def open_metrics(self):
        """metrics.jsonl, open and locked; the system frees the lock when the process ends, even if killed."""
        if not parallel.is_first():
            return io.BytesIO()                      # nowhere
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            file = open(self.metrics, "a+b")
        except OSError as e:
            raise InputError(f"{self.metrics}: cannot be written ({e.strerror}); name another --out") \
                from None
        try:
            lock(file, wait=False)
        except BlockingIOError:
            raise InputError(f"--out {self.out}: another run is writing there; wait until it ends, or give"
                             " another --out") from None
        except OSError:
            pass                                     # a file system without locks
        return file

    def remove_temporaries(self):
        """What killed runs left of the files that they were writing, see files.write_file."""
        if not parallel.is_first():                  # it alone has the lock
            return
        for pattern in (*(f".{name}.*.tmp" for name in FILES), "model/.*.tmp"):
            for temporary in self.out.glob(pattern):
                with contextlib.suppress(OSError):
                    temporary.unlink()

    def is_finished(self):
        try:
            return "held_out" in (open_safetensors(self.routers).metadata() or {})
        except InputError:                           # missing, or damaged
            return False

    def lines_to_keep(self):
        """The lines of metrics.jsonl whose steps are in the checkpoint."""
        self.file.seek(0)
        lines, where = [], f"{self.metrics} (if it is moved away, the run goes on without): a line"
        for line in self.file.read().splitlines(keepends=True)[:self.start]:
            entry = json_of(line, {"step": (0, math.inf)}, where)
            if entry.get("run") != self.id:
                raise InputError(f"--resume: {self.metrics} has lines of another run than {self.path}; move"
                                 " it away, or give another --out")
            if entry["step"] >= self.start:          # lines before it are missing
                break
            lines.append(line)
        return lines

    def load(self):
        self.checkpoint = open_safetensors(self.path, "delete it, or give another --out, to start afresh")
        meta = self.checkpoint.metadata() or {}
        if not {"step", "arguments"} <= meta.keys():
            raise InputError(f"{self.path}: not a checkpoint of train_router.py")
        saved = json_of(meta["arguments"], dict, f"{self.path}: its arguments")
        if saved.keys() != self.settings.keys():
            raise InputError(f"--resume: {self.path} is of another version of train_router.py; give another"
                             " --out to start afresh")
        for what, value in self.settings.items():
            if saved[what] != value:
                raise InputError(f"--resume: {self.path} was made with {what} {saved[what]}, now it is"
                                 f" {value}; give the same, or another --out to start afresh")
        self.start = number_of(meta["step"], 1, self.n_steps, f"{self.path}: its step", int)
        if self.start == self.n_steps:
            print(f"--resume: all steps of the run in {self.out} are done; what follows them is done"
                  f" {'again' if self.is_finished() else 'now'}", file=sys.stderr)

    def tensor(self, name, shape):
        """A tensor of the checkpoint, checked: see tensor_of."""
        return tensor_of(self.checkpoint, name, shape, self.path)

    def constant(self, name, shape, make):
        """Whole numbers that a run begins with, such as token ids: what make() gives. Checkpoints have them,
        and with --resume they are the checkpoint's."""
        numbers = self.tensor(name, shape).long() if self.checkpoint else make()
        self.constants[name] = numbers.float()       # exact below 2^24
        return numbers

    def save(self, step, tensors):
        if not parallel.is_first():
            return
        tensors = {key: tensor.cpu().contiguous() for key, tensor in (self.constants | tensors).items()}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise InputError(f"step {step}: {key} is no longer finite; {self.slower()}{self.kept()}")
        meta = {"step": str(step + 1), "arguments": json.dumps(self.settings)}
        write_file(self.path, safetensors_bytes(tensors, metadata=meta))
        self.save_result()                           # last: if the disk is full, the old router file remains

    def is_due(self, step):
        """Whether a step's result is to be saved: every few steps, at the end, and before the run stops."""
        self.note_signal()
        return self.stopped or step + 1 == self.n_steps or (step + 1) % self.args.save_every == 0

    def note_signal(self):
        self.stopped = max(parallel.gathered([self.signal]))        # processes stop at the same step

    def steps(self):
        """The steps that remain. After Ctrl-C or SIGTERM the running step is finished and saved, and the run
        ends."""
        def stop(number, frame):
            self.signal = number

        self.checkpoint = None                       # it was read; Windows replaces no open file
        self.file.truncate(sum(map(len, self.lines)))
        if self.start == 0:
            self.path.unlink(missing_ok=True)        # a finished run's
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        self.bar = tqdm(range(self.start, self.n_steps), initial=self.start, total=self.n_steps, unit="step")
        try:
            for step in self.bar:
                yield step
                if step + 1 == self.n_steps:         # a signal may have come during the last save
                    self.note_signal()
                if self.stopped:
                    parallel.gathered([])            # wait for what process 0 saves
                    self.bar.close()
                    print(f"stopped after step {step + 1} of {self.n_steps}, saved in {self.out}; --resume"
                          " goes on", file=sys.stderr)
                    sys.exit(128 + self.stopped)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def tuned(self):
        """Context manager for what follows the last step: Ctrl-C says how to go on."""
        try:
            yield
        except KeyboardInterrupt:
            print("\nstopped after the last step; --resume goes on", file=sys.stderr)
            sys.exit(130)

    def check_finite(self, step, loss):
        if not math.isfinite(loss):
            advice = "use --dtype float32 or another model"
            if step:
                advice = f"{self.slower()} or use --dtype float32"
            raise InputError(f"step {step}: the loss is {loss}; {advice}{self.kept()}")

    def slower(self):
        """What to do where a step was too large."""
        return "lower --lr and --model-lr" if self.args.train == "all" else "lower --lr"

    def kept(self):
        """The end of a refusal: what is left of the run."""
        return f"; the last checkpoint in {self.out} is kept" if self.path.exists() else ""

    def log(self, step, **numbers):
        """Append a line to metrics.jsonl; numbers has at least loss and capacity, which the bar shows."""
        try:
            self.file.write(json.dumps({"step": step, **numbers, "run": self.id}).encode() + b"\n")
            self.file.flush()
        except OSError as e:
            raise InputError(f"{self.metrics}: cannot be written ({e.strerror}){self.kept()}") from None
        step_seconds = self.bar.format_dict["elapsed"] / (step + 1 - self.start)
        self.bar.set_postfix(loss=f"{numbers['loss']:.3f}", capacity=f"{numbers['capacity']:.3f}",
                             then=tqdm.format_interval(self.later_steps * step_seconds))
