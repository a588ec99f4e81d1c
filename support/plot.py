"""Pictures of tuning runs and of what eval.py measured; needs matplotlib.

    python -m support.plot out/metrics.jsonl scores-0.73.json scores-0.85.json --out pictures

Of the metrics.jsonl of a run: curves.png, loss and capacity against the step. Of the files that eval.py
--json wrote, one a capacity: kl.png, KL to the dense model against overall capacity, a panel a text;
accuracy.png, the mean score of the tasks against it; keep.png, how often each layer ran on each task or text.
"""
from support.script import run_script  # isort: skip (before torch, see there)

import io
from pathlib import Path

from support.checked import check
from support.cli import Parser, check_destinations
from support.data import records
from support.tasks import TASKS
from weights import InputError, read_text, write_file

SHARE, NATS = (0, 1), (-1e9, 1e9)
STEP = {"step": (0, 1e9), "loss": NATS, "capacity": SHARE, "target": SHARE}               # of metrics.jsonl
TABLE = {"tasks": dict, "capacity": SHARE, "keep": {str: {int: SHARE}}}                   # of eval.py --json
TEXT = {"file": str, "capacity": SHARE, "kl": NATS}


def read(path):
    """What a script wrote: a list of steps of a run, or the scores of an evaluation."""
    found = list(records(read_text(path), path))
    first = found[0][1] if found and isinstance(found[0][1], dict) else {}
    if first.keys() >= STEP.keys():
        for where, step in found:
            check(step, STEP, where)
        return [step for _, step in found]
    if first.keys() >= TABLE.keys() and len(found) == 1:
        for table in tables_of(first).values():
            check_table(table, path)
        return first
    raise InputError(f"{path}: neither the metrics.jsonl of a run nor a file that eval.py --json wrote")


def check_table(table, path):
    check(table, TABLE, path)
    for name, task in table["tasks"].items():
        if name not in TASKS:
            raise InputError(f"{path}: there is no task {name[:40]!r}")
        check(task, {"acc_norm" if TASKS[name].norm else "acc": SHARE}, f"{path}: {name}")
    if table.get("text"):
        check(table["text"], TEXT, f"{path}: its text")


VARIANTS = "dense", "static", "shuffled", "random"


def tables_of(scores):
    """{name: its table} of what eval.py wrote, the routed model's (or, without routers, the dense) first."""
    others = {name: scores[name] for name in VARIANTS if name in scores}
    return {"routed" if "dense" in others else "dense": scores} | others


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


def kl(figure, evaluations):
    points = {}                                                            # {text: {variant: [(x, y)]}}
    for scores in evaluations:
        for name, table in tables_of(scores).items():
            if table.get("text") and name != "dense":
                text = points.setdefault(table["text"]["file"], {})
                text.setdefault(name, []).append((table["text"]["capacity"], table["text"]["kl"]))
    if not points:
        return False
    for axes, (text, some) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items()):
        against_capacity(axes, some, "KL to dense, nats a token", Path(text).parent.name or text)


def accuracy(figure, evaluations):
    points = {}
    for scores in evaluations:
        for name, table in tables_of(scores).items():
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


def speedups(rows, path):
    """What bench.py measured: speedup against context for each routed variant, and its limit as a dashed
    line."""
    figure = new_figure(7)
    axes, lines = figure.subplots(), {}
    for row in rows:
        if row["variant"] == "routed":
            name = f"{row['phase']}, {row['granularity']} {row['capacity']:.2f}, batch {row['batch']}"
            lines.setdefault(name, []).append((row["context"], row["speedup"], row["limit"]))
    for name, points in lines.items():
        context, speedup, limit = zip(*sorted(points))
        line, = axes.plot(context, speedup, marker="o", label=name)
        axes.plot(context, limit, "--", color=line.get_color())
    axes.set(xlabel="context, tokens", ylabel="speedup over dense (dashed: the limit)", xscale="log")
    axes.axhline(1, color="grey", linewidth=0.5)
    axes.legend()
    save_figure(figure, path)


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


def new_figure(width):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, 4.5), layout="constrained")


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="+", help="metrics.jsonl of runs, and what eval.py --json wrote")
    p.add_argument("--out", default="pictures", help="folder for the pictures")
    args = p.parse_args()
    drawings = {f"{draw.__name__}.png": draw for draw in (curves, kl, accuracy, keep)}
    for name in drawings:
        check_picture(Path(args.out) / name)
    found = {path: read(path) for path in args.files}
    runs = {path: steps for path, steps in found.items() if isinstance(steps, list)}
    evaluations = [scores for scores in found.values() if isinstance(scores, dict)]
    for name, draw in drawings.items():
        figure, data = new_figure(8), runs if draw is curves else evaluations
        if data and draw(figure, data) is not False:
            save_figure(figure, Path(args.out) / name, dpi=120)
            print(Path(args.out) / name)


if __name__ == "__main__":
    run_script("plot.py", main)
