"""Pictures of tuning runs and of what eval.py and bench.py measured; needs matplotlib.

    python -m support.plot out/metrics.jsonl scores.json bench.json --out pictures

Of the metrics.jsonl of a run: curves.png, loss and capacity against the step. Of the files that eval.py
--json wrote: kl.png, KL to the dense model against overall capacity, a panel per text; accuracy.png, the mean
score of the tasks against it; keep.png, how often each layer ran on each task or text. Of these and of files
that bench.py --json wrote, of the same capacities: tradeoff.png, KL against measured speedup, a column per
setting, and a table of the speedup at equal KL.
"""
from support.script import run_script  # isort: skip (before torch, see there)

import io
from pathlib import Path

import numpy as np

from support.checked import check
from support.cli import Parser, check_destinations
from support.data import records
from support.tasks import TASKS
from weights import InputError, read_text, write_file

SHARE, NATS = (0, 1), (-1e9, 1e9)
STEP = {"step": (0, 1e9), "loss": NATS, "capacity": SHARE, "target": SHARE}               # of metrics.jsonl
TABLE = {"tasks": dict, "capacity": SHARE, "keep": {str: {int: SHARE}}}                   # of eval.py --json
TEXT = {"file": str, "capacity": SHARE, "kl": NATS}
ROUTERS = {"granularity": str, "kv": str}
BENCH = {"machine": {"kv": str}, "rows": [{"variant": str}]}                              # of bench.py --json
ROW = {"phase": str, "batch": (1, 1e9), "context": (1, 1e9), "capacity": SHARE, "speedup": (0, 1e9)}
EQUAL_HARM = 0.1, 0.2, 0.4                                                                # KL, nats per token


def read(path):
    """What a script wrote: a list of steps of a run, the scores of an evaluation, or times."""
    found = list(records(read_text(path), path))
    first = found[0][1] if found and isinstance(found[0][1], dict) else {}
    if first.keys() >= STEP.keys():
        for where, step in found:
            check(step, STEP, where)
        return [step for _, step in found]
    if first.keys() >= TABLE.keys() and len(found) == 1:
        if "routers" in first:
            check(first["routers"], ROUTERS, f"{path}: routers")
        for _, table in tables_of(first):
            check_table(table, path)
        return first
    if first.keys() >= BENCH.keys() and len(found) == 1:
        check(first, BENCH, path)
        for row in timed_rows(first):
            check(row, ROW | {"granularity": str} if row["variant"] == "routed" else ROW, f"{path}: a row")
        return first
    raise InputError(f"{path}: neither the metrics.jsonl of a run nor a file that eval.py or bench.py --json"
                     " wrote")


def check_table(table, path):
    check(table, TABLE, path)
    for name, task in table["tasks"].items():
        if name not in TASKS:
            raise InputError(f"{path}: there is no task {name[:40]!r}")
        check(task, {"acc_norm" if TASKS[name].norm else "acc": SHARE}, f"{path}: {name}")
    if table.get("text"):
        check(table["text"], TEXT, f"{path}: its text")


VARIANTS = "dense", "routed", "static", "shuffled", "random"


def tables_of(scores):
    """[(variant, its table)] of what eval.py wrote, the routed model's (or, without routers, the dense)
    first; a variant is there once for each of its capacities."""
    tables = [("routed" if "dense" in scores else "dense", scores)]
    for name, table in scores.items():
        variant = name.split(" ")[0]
        if variant in VARIANTS:
            tables.append((variant, table))
    return tables


def routers_name(granularity, kv):
    return granularity if kv == "all" else f"{granularity}, kv {kv}"


def timed_rows(bench):
    return [row for row in bench["rows"] if row["variant"] in ("routed", "static")]


def curves(figure, runs):
    """Loss and capacity against the step, a line a run; the target is dashed."""
    loss, capacity = figure.subplots(2, sharex=True)
    for path, steps in runs.items():
        step = [s["step"] for s in steps]
        line, = loss.plot(step, [s["loss"] for s in steps], label=plain(path))
        capacity.plot(step, [s["capacity"] for s in steps], color=line.get_color())
        capacity.plot(step, [s["target"] for s in steps], "--", color=line.get_color())
    loss.set(ylabel="loss, nats")
    loss.legend()
    capacity.set(xlabel="step", ylabel="overall capacity (dashed: target)")


def against_capacity(axes, points, ylabel, title=None):
    """points: {variant: [(capacity, value)]}."""
    for name, some in points.items():
        axes.plot(*zip(*sorted(some)), marker="o", label=name)
    axes.set(xlabel="overall capacity", ylabel=ylabel, title=title and plain(title))
    axes.legend()


def harms(evaluations):
    """{text: {variant: [(capacity, KL)]}}; routed models are told apart by their granularity."""
    points = {}
    for scores in evaluations:
        for name, table in tables_of(scores):
            if table.get("text") and name != "dense":
                if name == "routed" and "routers" in scores:
                    name = routers_name(scores["routers"]["granularity"], scores["routers"]["kv"])
                text = points.setdefault(table["text"]["file"], {})
                text.setdefault(name, []).append((table["text"]["capacity"], table["text"]["kl"]))
    return points


def kl(figure, evaluations):
    points = harms(evaluations)
    if not points:
        return False
    for axes, (text, some) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items()):
        against_capacity(axes, some, "KL to dense, nats a token", Path(text).parent.name or text)


def accuracy(figure, evaluations):
    points = {}
    for scores in evaluations:
        for name, table in tables_of(scores):
            metrics = [t["acc_norm"] if TASKS[task].norm else t["acc"] for task, t in table["tasks"].items()]
            if metrics:
                points.setdefault(name, []).append((table["capacity"], 100 * sum(metrics) / len(metrics)))
    if not points:
        return False
    against_capacity(figure.subplots(), points, "mean score of the tasks, %")


def keep(figure, evaluations):
    rows = {f"{plain(Path(what).parent.name or what)}, {sum(layers.values()) / len(layers):.2f}": layers
            for scores in evaluations for what, layers in scores["keep"].items() if layers}
    if not rows:
        return False
    layers = sorted({int(i) for of in rows.values() for i in of})
    axes = figure.subplots()
    share = [[of.get(str(i), 1.0) for i in layers] for of in rows.values()]
    image = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(layers)), layers, fontsize=7)
    axes.set(xlabel="layer")
    figure.colorbar(image, label="share that ran")


def speeds(benches):
    """{(phase, batch, context): {variant: [(capacity, speedup)]}}."""
    points = {}
    for bench in benches:
        for row in timed_rows(bench):
            name = row["variant"]
            if name == "routed":
                kv = bench["machine"]["kv"] if row["granularity"].endswith("token") else "all"
                name = routers_name(row["granularity"], kv)
            setting = points.setdefault((row["phase"], row["batch"], row["context"]), {})
            setting.setdefault(name, []).append((row["capacity"], row["speedup"]))
    return points


def tradeoffs(evaluations, benches):
    """{text: {setting: {variant: [(speedup, KL)]}}}: KL at the capacity that was timed, interpolated between
    those that were evaluated and (capacity 1, KL 0)."""
    points, timings = {}, speeds(benches)
    for text, kl_points in harms(evaluations).items():
        for setting, timed in timings.items():
            for name in timed.keys() & kl_points.keys():
                capacities, values = zip(*sorted([*kl_points[name], (1.0, 0.0)]))
                dots = [(speedup, float(np.interp(c, capacities, values)))
                        for c, speedup in sorted(timed[name], reverse=True) if c >= capacities[0]]
                points.setdefault(text, {}).setdefault(setting, {})[name] = dots
    return points


def all_settings(points):
    return list(dict.fromkeys(setting for by_setting in points.values() for setting in by_setting))


def tradeoff(figure, points):
    """points: see tradeoffs. A row of panels per text, a column per setting; the lines to the right win."""
    settings = all_settings(points)
    panels = figure.subplots(len(points), len(settings), squeeze=False, sharey="row")
    for row, (text, by_setting) in zip(panels, points.items()):
        for axes, (phase, batch, context) in zip(row, settings):
            for name, dots in sorted(by_setting.get((phase, batch, context), {}).items()):
                axes.plot(*zip(*dots), marker="o", markersize=4, label=name)
            axes.axvline(1, color="grey", linewidth=0.5)
            axes.set(title=f"{phase}, {context:,} tokens, batch {batch}", xlabel="speedup over dense")
        row[0].set(ylabel=f"KL to dense on {plain(Path(text).parent.name or text)}")
    panels[0][0].legend()


def equal_harm(points):
    """Lines of a table: the speedup of each variant at the same KL, between its dots; - outside them."""
    found = [variants for settings in points.values() for variants in settings.values()]
    names = sorted(set().union(*found))
    yield f"{'speedup at equal KL':44}{'KL':>5}" + "".join(f"{name:>22}" for name in names)
    for text, settings in points.items():
        for (phase, batch, context), variants in settings.items():
            where = f"{Path(text).parent.name or text}, {phase} of {context:,}, batch {batch}"
            for level in EQUAL_HARM:
                cells = [speedup_at(level, variants.get(name, [])) for name in names]
                yield f"{where:44}{level:5}" + "".join(f"{cell:>22}" for cell in cells)


def speedup_at(level, dots):
    """The speedup at a KL, as text, from dots (speedup, KL) in order of KL."""
    if not dots or not dots[0][1] <= level <= dots[-1][1]:
        return "-"
    speedup, values = zip(*dots)
    return f"{np.interp(level, values, speedup):.3f}"


def plain(name):
    """A name as matplotlib takes it for text, not for a formula."""
    return name.replace("$", r"\$")


def save_figure(figure, path, **form):
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:].lower() or "png", **form)
    write_file(path, picture.getvalue())


def check_picture(path):
    """InputError, before the work, where a picture could not be drawn or written; None: no picture."""
    if path is None:
        return
    known = new_figure(8).canvas.get_supported_filetypes()
    if Path(path).suffix and Path(path).suffix[1:].lower() not in known:
        raise InputError(f"{path}: no kind of picture that matplotlib draws; name a .png file")
    check_destinations(path)


def new_figure(width, height=4.5):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="+", help="metrics.jsonl of runs, what eval.py and bench.py --json wrote")
    p.add_argument("--out", default="pictures", help="folder for the pictures")
    args = p.parse_args()
    drawings = {f"{draw.__name__}.png": draw for draw in (curves, kl, accuracy, keep)}
    for name in (*drawings, "tradeoff.png"):
        check_picture(Path(args.out) / name)
    found = {path: read(path) for path in args.files}
    runs = {path: steps for path, steps in found.items() if isinstance(steps, list)}
    benches = [table for table in found.values() if "rows" in table]
    evaluations = [table for table in found.values() if "tasks" in table]
    for name, draw in drawings.items():
        figure, data = new_figure(8), runs if draw is curves else evaluations
        if data and draw(figure, data) is not False:
            save_figure(figure, Path(args.out) / name, dpi=120)
            print(Path(args.out) / name)
    points = tradeoffs(evaluations, benches)
    if points:
        figure = new_figure(1 + 3.5 * len(all_settings(points)), 0.5 + 3.5 * len(points))
        tradeoff(figure, points)
        save_figure(figure, Path(args.out) / "tradeoff.png", dpi=100)
        print(Path(args.out) / "tradeoff.png", *equal_harm(points), sep="\n")


if __name__ == "__main__":
    run_script("plot.py", main)
