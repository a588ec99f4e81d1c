"""Files, and the tensors in them: read with checks, written whole. What is wrong with one is told in a
sentence, an InputError. What JSON and metadata say is read through `read_value`: its kind, its range.
"""
import errno
import json
import math
import os
import reprlib
import stat
import tempfile
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

try:
    import fcntl
except ImportError:      # Windows
    fcntl = None


NO_MEMORY = "allocate memory", "out of memory", "ALLOC_FAILED"      # as a CPU, CUDA and its libraries say it


class InputError(ValueError):
    """Bad input, in one sentence: what is wrong, where, what to do. Scripts print it and exit with 1. It is
    one line of at most LONGEST characters, whatever it quotes."""
    LONGEST = 600

    def __str__(self):
        sentence, half = " ".join(super().__str__().split()), self.LONGEST // 2
        return sentence if len(sentence) <= 2 * half else f"{sentence[:half]} ... {sentence[-half:]}"


def reason(error):
    """The first line of what an exception says, without the file name."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0] or type(error).__name__


def read_text(path, remedy="get it again"):
    """The text of a file, without a byte-order mark. InputError where it is missing or not UTF-8."""
    try:
        return Path(path).read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; {remedy}") from None
    except (OSError, ValueError) as e:               # ValueError: a path with a null character
        raise InputError(f"{path}: cannot be read ({reason(e)}); {remedy}") from None


def read_json(path, remedy="get it again"):
    """The object in a JSON file. InputError where it is missing, unreadable or something else."""
    text = read_text(path, remedy)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}: cannot be read as JSON ({reason(e)}); {remedy}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: should hold one JSON object; {remedy}")
    return value


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
         dict: "an object"}
REQUIRED = object()
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16
LARGEST = torch.finfo(torch.float16).max     # no larger weight is accepted: public models run in float16
LARGEST_ID = 2**31 - 1
READ_OF_FOLDERS = ("*config.json", "*.index.json", "*.safetensors", "*.gguf", "tokenizer*", "*.jinja",
                   "special_tokens_map.json", "*.jsonl")           # of a model's, or of tasks'


def read_value(data, where, key, kind, default=REQUIRED, low=-math.inf, high=math.inf):
    """data[key], a value from a file, of a kind or one of several, a number from low to high; `default` where
    it is absent or null. InputError names the key, and `where` the file."""
    value, kinds = data.get(key), kind if isinstance(kind, tuple) else (kind,)
    if value is None:
        if default is REQUIRED:
            raise InputError(f"{where}: lacks {key!r}")
        return default
    is_number = type(value) in (int, float)
    fits = type(value) in kinds or (float in kinds and is_number)
    if fits and (not is_number or low <= value <= high):
        return value
    words = " or ".join(KINDS[k] for k in kinds)
    limits = f" from {low} to {high}" if high < math.inf else ""
    raise InputError(f"{where}: {key} should be {words}{limits}, not {reprlib.repr(value)}")


def read_list(data, where, key, kind, default=REQUIRED, low=-math.inf, high=math.inf):
    """read_value for a list of values; a single value counts as a list of one."""
    values = read_value(data, where, key, (kind, list), default, low, high)
    values = values if isinstance(values, list) else [values]
    for i, value in enumerate(values):
        read_value({f"{key}[{i}]": value}, where, f"{key}[{i}]", kind, REQUIRED, low, high)
    return values


def open_safetensors(path, remedy="get it again"):
    """A safetensors file, opened lazily. InputError if it is missing, truncated or something else."""
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise InputError(f"{path}: this file is missing; {remedy}") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({reason(e)}); {remedy}") from None


def open_gguf(path, remedy="get it again"):
    """(metadata, tensors) of a GGUF file, by the `gguf` package. InputError if it is not whole: by itself the
    package reads on for hours where a damaged length points beyond the file's end, and fills the memory."""
    import gguf  # half a second to import

    class Reader(gguf.GGUFReader):
        def _get(self, offset, dtype, count=1, **order):
            values = super()._get(offset, dtype, count, **order)
            if len(values) != count:
                raise ValueError("it ends too early")
            return values

        def _get_field_parts(self, offset, kind):
            if kind == gguf.GGUFValueType.ARRAY and self._get(offset + 4, np.uint64)[0] > 2**21:
                raise ValueError("an array in its metadata has millions of elements")
            return super()._get_field_parts(offset, kind)

    try:
        with np.errstate(all="ignore"):
            reader = Reader(path)
            return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors
    except Exception as e:   # on a damaged file the package raises whatever its arithmetic ran into
        raise InputError(f"{path}: not a whole GGUF file ({reason(e)}); {remedy}") from None


def write_file(path, data):
    """Write bytes under a temporary name, then rename: `path` is its old self or the new one, whole. A link
    is followed, a mode is kept, and what is no regular file, a device or a pipe, is written to as it is."""
    real = Path(os.path.realpath(path))
    temporary = real.with_name(f".{real.name}.{os.getpid()}.tmp")
    try:
        if os.path.exists(path) and not os.path.isfile(path):      # of a pipe there is no real path
            Path(path).write_bytes(data)
            return
        real.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if real.exists():
                os.chmod(temporary, real.stat().st_mode & 0o7777)
            os.replace(temporary, real)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({reason(e)}); what was there is unchanged") from None


def check_destinations(*paths, read=()):
    """InputError, before the work, for a path that cannot be written, or that the work reads: it is one of
    `read`, or a file that is read in one of these folders. None is skipped."""
    for path in filter(None, paths):
        if any(is_of(path, source) for source in read if source):
            raise InputError(f"{path}: is read, and would be lost; name another place to write to")
        try:
            try_to_write(path)
        except OSError as e:
            raise InputError(f"{path}: cannot be written ({reason(e)}); name another place") from None


def is_of(path, source):
    """Whether a path is a source that is read, or one of the files that are read of a folder."""
    path, source = os.path.realpath(path), os.path.realpath(os.path.expanduser(source))
    if not os.path.isdir(source):
        return path == source
    inside = os.path.exists(path) and path.startswith(os.path.join(source, ""))
    return inside and any(fnmatch(os.path.basename(path), name) for name in READ_OF_FOLDERS)


def is_printed_to(path):
    """Whether this process prints to this file."""
    for stream in 1, 2:
        with suppress(OSError):                                                # it is closed
            if os.path.samestat(os.stat(path), os.fstat(stream)):
                return True
    return False


def try_to_write(path):
    """Raise the OSError that write_file would, and leave nothing behind. A pipe is refused: files are written
    more than once."""
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if os.path.exists(path) and not os.path.isfile(path):                      # a device or a pipe
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is a pipe")
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "permission denied")
        return
    if os.path.isfile(path) and is_printed_to(path):
        raise OSError(errno.EINVAL, "the tables are printed there")
    path = os.path.realpath(path)
    longest = max(len(os.fsencode(part)) for part in path.split(os.sep))
    if longest > 240 or len(path) > 4000:                                      # with room for ".PID.tmp"
        raise OSError(errno.ENAMETOOLONG, "the name is too long")
    folder = os.path.dirname(path)
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    with tempfile.TemporaryFile(dir=folder):
        pass


def cache_folder():
    """The folder in the user's cache where what was fetched or made is kept."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "router-tuning"
    except RuntimeError:
        raise InputError("there is no home folder to keep files in; set HOME or XDG_CACHE_HOME") from None


def lock(file, wait=True):
    """Lock an open file until it is closed, or its process ends. BlockingIOError where another has it and
    this one does not wait; nothing where the system has no such locks."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path):
    """Context manager that holds the lock `path`, a file that is created for it and stays."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
        lock(file)
    except OSError as e:
        raise InputError(f"{path}: cannot be locked ({reason(e)}); set XDG_CACHE_HOME to a folder of yours") \
            from None
    with file:
        yield


class Checkpoint:
    """What a folder and a GGUF file have in common. stored: {tensor name: (what reads it, its shape)}."""

    @property
    def names(self):
        return set(self.stored)

    def check_tensors(self, shapes):
        """Refuse tensors that are missing, misshapen or left over, before one is read; {name: shape}."""
        for name, shape in shapes.items():
            if name not in self.stored:
                raise InputError(f"{self.path}: tensor {name} is missing; {self.remedy}")
            _, its_shape = self.stored[name]
            if its_shape != tuple(shape):
                raise InputError(f"{self.path}: tensor {name} has shape {its_shape}, but the config asks for"
                                 f" {tuple(shape)}")
        unused = [name for name in self.names - set(shapes) if not name.endswith("rotary_emb.inv_freq")]
        if unused:
            raise InputError(f"{self.path}: tensor {min(unused)!r} has no place in this model;"
                             " is the config right?")

    def tensor(self, name):
        tensor = self.read(name)
        if tensor.dtype not in FLOATS:
            raise InputError(f"{self.path}: tensor {name} holds {tensor.dtype}, which is not supported;"
                             " get the model in bfloat16 or float16")
        low, high = tensor.aminmax() if tensor.numel() else (0, 0)
        if not max(-low, high) <= LARGEST:
            raise InputError(f"{self.path}: tensor {name} holds NaN, infinity or numbers beyond {LARGEST:g};"
                             f" {self.remedy}")
        return tensor

    def tie(self, name, other):
        """Whether two tensors that the config ties are one: only one is there, or both are equal. It then has
        the first name."""
        if {name, other} <= self.names and not torch.equal(self.tensor(name), self.tensor(other)):
            return False
        if other in self.stored:
            self.stored[name] = self.stored.pop(other)
        return True
