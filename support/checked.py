"""What comes out of files, checked: that it is there, its kind, its range. InputError says where not."""
import json
import math
import os

from safetensors import SafetensorError

from support.files import KINDS, InputError, open_safetensors


def check(value, form, where):
    """InputError where a JSON value has not its form. Forms: str, dict or list; (low, high), a number between
    these; [form], a list of values of that form; {"name": form}, an object with at least these fields; {str:
    form}, one whose values all have that form; {int: form}, one whose names are whole numbers, too."""
    if isinstance(form, tuple):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not form[0] <= value <= form[1]:
            raise InputError(f"{where} should be a number from {form[0]} to {form[1]}, not {shown(value)}")
        return
    kind = form if isinstance(form, type) else type(form)
    if not isinstance(value, kind):
        raise InputError(f"{where} should be {KINDS[kind]}, not {shown(value)}")
    if isinstance(form, list):
        for i, item in enumerate(value):
            check(item, form[0], f"{where}[{i}]")
    if isinstance(form, dict):
        for name, inner in form.items():
            if isinstance(name, str) and name not in value:
                raise InputError(f"{where} lacks the field {name!r}")
            for key in [name] if isinstance(name, str) else value:
                if name is int:
                    number_of(key, 0, 10**6, f"{where}: a name", int)
                check(value[key], inner, f"{where}: {key!r}")


def shown(value):
    """A value as a message shows it."""
    text = KINDS[type(value)] if isinstance(value, (dict, list)) else repr(value)
    return text if len(text) <= 40 else text[:40] + "..."


def json_of(text, form, where):
    """The value of a JSON text, of a form, see `check`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where} is not valid JSON; the file is damaged") from None
    check(value, form, where)
    return value


def number_of(text, low, high, where, kind=float):
    """The number, from low to high, that a text says."""
    try:
        number = kind(text)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise InputError(f"{where} should be a number from {low} to {high}, not {shown(text)}")
    return number


def tensor_of(file, name, shape, where):
    """A tensor of an open safetensors file, all its numbers finite. shape: None where any size will do."""
    try:
        tensor = file.get_tensor(name)
    except SafetensorError:
        tensor = None
    fits = tensor is not None and tensor.is_floating_point() and tensor.numel() and tensor.dim() == len(shape)
    if not fits or any(size not in (None, there) for size, there in zip(shape, tensor.shape)):
        raise InputError(f"{where}: tensor {name} is missing, or not floats of shape {tuple(shape)}")
    if not tensor.float().isfinite().all():
        raise InputError(f"{where}: tensor {name} has numbers that are not finite; get the file again")
    return tensor


def check_choices(values, choices, where=""):
    """InputError, beginning with `where`, unless each values[name] is in choices[name]."""
    for name, known in choices.items():
        if values[name] not in known:
            raise InputError(f"{where}{name} {values[name]!r} is not one of {', '.join(known)}; choose one,"
                             " or start the script through the file that adds it, as those of examples/")


def check_ids(low, high, vocab_size):
    """InputError where token ids, from low to high, are not all in the vocabulary."""
    if low < 0 or high >= vocab_size:
        raise InputError(f"token id {low if low < 0 else high} is not in the model's vocabulary of"
                         f" {vocab_size}; is this tokenizer the model's own?")


def open_router_file(path):
    """(the open file, its metadata) of what router.save_routers wrote."""
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; give the router file in it")
    file = open_safetensors(path, "train_router.py writes one")
    older = {"gate": "linear", "kv": "all", "calibration": "[]"}              # files that do not say these
    meta = older | (file.metadata() or {})
    missing = {"granularity", "layers", "pool", "threshold", "model"} - meta.keys()
    if missing:
        raise InputError(f"{path}: not a router file (it has no {min(missing)}); train_router.py writes one")
    number_of(meta["threshold"], 0, 1, f"{path}: its threshold")
    json_of(meta["model"], dict, f"{path}: its model")
    for pair in json_of(meta["calibration"], [[(0, 1)]], f"{path}: its calibration"):
        if len(pair) != 2:
            raise InputError(f"{path}: its calibration should be pairs (threshold, capacity)")
    return file, meta
