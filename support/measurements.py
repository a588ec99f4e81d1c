"""What the scripts measured, read from the files that they wrote, and joined: KL, speed, both."""
from pathlib import Path

import numpy as np

from support.checked import check
from support.data import records
from support.files import InputError, read_text
from support.tasks import TASKS

SHARE, NATS = (0, 1), (-1e9, 1e9)
STEP = {"step": (0, 1e9), "loss": NATS, "capacity": SHARE, "target": SHARE}               # of metrics.jsonl
TABLE = {"tasks": dict, "capacity": SHARE, "keep": {str: {int: SHARE}}}                   # of eval.py --json
TEXT = {"file": str, "capacity": SHARE, "kl": NATS}
ROUTERS = {"granularity": str, "kv": str, "file": str, "hash": str}
BENCH = {"machine": {"kv": str}, "rows": [{"variant": str}]}                              # of bench.py --json
ROW = {"phase": str, "batch": (1, 1e9), "context": (1, 1e9), "capacity": SHARE, "speedup": (0, 1e9)}
VARIANTS = "dense", "routed", "static", "shuffled"
EQUAL_KL = 0.1, 0.2, 0.4                                                                  # nats per token


# ----------------------------------------------------------------------------------------------------- files
def read(path):
    """What a script wrote: a list of steps of a run, the scores of an evaluation, or times."""
    values = list(records(read_text(path), path))
    first = values[0][1] if values and isinstance(values[0][1], dict) else {}
    if first.keys() >= STEP.keys():
        for where, step in values:
            check(step, STEP, where)
        return [step for _, step in values]
    if first.keys() >= TABLE.keys() and len(values) == 1:
        check_routers(first, path)
        for _, table in tables_of(first):
            check_table(table, path)
        return first
    if first.keys() >= BENCH.keys() and len(values) == 1:
        check(first, BENCH, path)
        check_routers(first["machine"], path)
        for row in timed_rows(first):
            check(row, ROW | {"granularity": str} if row["variant"] == "routed" else ROW, f"{path}: a row")
        return first
    raise InputError(f"{path}: neither the metrics.jsonl of a run nor a file that eval.py or bench.py --json"
                     " wrote")


def check_routers(table, path):
    if table.get("routers") is not None:
        check(table["routers"], ROUTERS, f"{path}: routers")


def check_table(table, path):
    check(table, TABLE, path)
    for name, task in table["tasks"].items():
        if name not in TASKS:
            raise InputError(f"{path}: there is no task {name[:40]!r}")
        check(task, {TASKS[name].metric: SHARE}, f"{path}: {name}")
    if table.get("text"):
        check(table["text"], TEXT, f"{path}: its text")


def tables_of(scores):
    """[(variant, its table)] of what eval.py wrote, the routed model's (or, without routers, the dense)
    first; a variant is there once for each of its capacities."""
    tables = [("routed" if "dense" in scores else "dense", scores)]
    for name, table in scores.items():
        variant = name.split(" ")[0]
        if variant in VARIANTS:
            tables.append((variant, table))
    return tables


def timed_rows(bench):
    return [row for row in bench["rows"] if row["variant"] in ("routed", "static")]


# ----------------------------------------------------------------------------------------------------- names
def short(path):
    """A file's name in a picture, with its folder's."""
    return "/".join(Path(path).parts[-2:])


def kind_of(granularity, kv):
    has_kv = granularity in ("attn_token", "block_token")                # router.KV_OPEN
    return f"{granularity}, kv {kv}" if has_kv and kv != "all" else granularity


def routers_names(evaluations, benches):
    """{hash of a router file: its name in a picture}: the kind of its gates, and the file where several have
    that kind."""
    files = {}                                                           # {kind: {hash: file}}
    for table in [*evaluations, *(bench["machine"] for bench in benches)]:
        routers = table.get("routers")
        if routers:
            kind = kind_of(routers["granularity"], routers["kv"])
            files.setdefault(kind, {})[routers["hash"]] = routers["file"]
    names = {}
    for kind, file_of in files.items():
        for file_hash, file in file_of.items():
            names[file_hash] = kind if len(file_of) == 1 else f"{kind}, {short(file)}"
    return names


# ----------------------------------------------------------------------------------------------- KL and speed
def named_tables(evaluations, benches=()):
    """(name of the model in a picture, its table) of what eval.py wrote; benches: see routers_names."""
    names = routers_names(evaluations, benches)
    for scores in evaluations:
        for name, table in tables_of(scores):
            if name == "routed" and scores.get("routers"):
                name = names[scores["routers"]["hash"]]
            yield name, table


def kl_points(evaluations, benches=()):
    """{text: {variant: [(capacity, KL)]}}; benches: see routers_names."""
    points = {}
    for name, table in named_tables(evaluations, benches):
        if table.get("text") and name != "dense":
            of_text = points.setdefault(table["text"]["file"], {})
            of_text.setdefault(name, []).append((table["text"]["capacity"], table["text"]["kl"]))
    return points


def speed_points(evaluations, benches):
    """{(phase, batch, context): {variant: [(capacity, speedup)]}}, named as kl_points names them."""
    names, points = routers_names(evaluations, benches), {}
    for bench in benches:
        machine = bench["machine"]
        for row in timed_rows(bench):
            name = row["variant"]
            if name == "routed" and machine.get("routers"):
                name = names[machine["routers"]["hash"]]
            elif name == "routed":
                name = kind_of(row["granularity"], machine["kv"])
            of_setting = points.setdefault((row["phase"], row["batch"], row["context"]), {})
            of_setting.setdefault(name, []).append((row["capacity"], row["speedup"]))
    return points


def tradeoffs(evaluations, benches):
    """{text: {setting: {variant: [(speedup, KL)]}}}: KL at the capacity that was timed, interpolated between
    those that were evaluated and (capacity 1, KL 0)."""
    speeds, points = speed_points(evaluations, benches), {}
    for text, kls in kl_points(evaluations, benches).items():
        for setting, timed in speeds.items():
            for name in timed.keys() & kls.keys():
                capacities, values = zip(*sorted([*kls[name], (1.0, 0.0)]))
                dots = [(speedup, float(np.interp(c, capacities, values)))
                        for c, speedup in sorted(timed[name], reverse=True) if c >= capacities[0]]
                if dots:
                    points.setdefault(text, {}).setdefault(setting, {})[name] = dots
    return points


def equal_kl_table(points):
    """Lines of a table: the speedup of each variant at the same KL, between its dots; - outside them. points:
    see tradeoffs."""
    variants = [dots for settings in points.values() for dots in settings.values()]
    names = sorted(set().union(*variants))
    width = max(22, *(len(name) + 2 for name in names))
    yield f"{'speedup at equal KL':44}{'KL':>5}" + "".join(f"{name:>{width}}" for name in names)
    for text, settings in points.items():
        for (phase, batch, context), dots in settings.items():
            where = f"{short(text)}, {phase} of {context:,}, batch {batch}"
            for level in EQUAL_KL:
                cells = [speedup_at(level, dots.get(name, [])) for name in names]
                yield f"{where:44}{level:5}" + "".join(f"{cell:>{width}}" for cell in cells)


def speedup_at(level, dots):
    """The speedup at a KL, as text, from dots (speedup, KL), whose KL should rise."""
    speedup, values = zip(*dots) if dots else ((), ())
    if not dots or list(values) != sorted(values) or not values[0] <= level <= values[-1]:
        return "-"
    return f"{np.interp(level, values, speedup):.3f}"
