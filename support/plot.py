"""Pictures of tuning runs and of what eval.py measured; needs matplotlib.

    python -m support.plot out/metrics.jsonl scores-0.73.json scores-0.85.json --out pictures

Of the metrics.jsonl of a run: curves.png, loss and capacity against the step. Of the files that eval.py
--json wrote, one a capacity: kl.png, KL to the dense model against overall capacity, a panel a text;
accuracy.png, the mean score of the tasks against it; keep.png, how often each layer ran on each task or text.
"""
import argparse
from pathlib import Path

from support.cli import run_script
from support.data import records
from support.tasks import TASKS
from weights import InputError, read_text


def read(path):
    """What a script wrote: a list of steps of a run, or the scores of an evaluation."""
    found = [record for _, record in records(read_text(path), path)]
    if found and all(isinstance(step, dict) and {"step", "loss", "capacity", "target"} <= step.keys()
                     for step in found):
        return found
    if len(found) == 1 and isinstance(found[0], dict) and {"tasks", "capacity", "keep"} <= found[0].keys():
        return found[0]
    raise InputError(f"{path}: neither the metrics.jsonl of a run nor a file that eval.py --json wrote")


def tables_of(scores):
    """{name: its table} of what eval.py wrote, the routed model's (or, without routers, the dense) first."""
    others = {name: scores[name] for name in ("dense", "static", "shuffled", "random") if name in scores}
    return {"routed" if "dense" in others else "dense": scores} | others


def curves(figure, runs):
    """Loss and capacity against the step, a line a run; the target is dashed."""
    loss, capacity = figure.subplots(2, sharex=True)
    for path, steps in runs.items():
        step = [s["step"] for s in steps]
        line, = loss.plot(step, [s["loss"] for s in steps], label=path)
        capacity.plot(step, [s["capacity"] for s in steps], color=line.get_color())
        capacity.plot(step, [s["target"] for s in steps], "--", color=line.get_color())
    loss.set(ylabel="loss, nats")
    loss.legend()
    capacity.set(xlabel="step", ylabel="overall capacity (dashed: target)")


def against_capacity(axes, points, ylabel, title=None):
    """points: {variant: [(capacity, value)]}."""
    for name, some in points.items():
        axes.plot(*zip(*sorted(some)), marker="o", label=name)
    axes.set(xlabel="overall capacity", ylabel=ylabel, title=title)
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
    rows = {f"{Path(what).parent.name or what}, {sum(layers.values()) / len(layers):.2f}": layers
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
    figure.savefig(path)


def new_figure(width):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, 4.5), layout="constrained")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="+", help="metrics.jsonl of runs, and what eval.py --json wrote")
    p.add_argument("--out", default="pictures", help="folder for the pictures")
    args = p.parse_args()
    new_figure(8)
    found = {path: read(path) for path in args.files}
    runs = {path: steps for path, steps in found.items() if isinstance(steps, list)}
    evaluations = [scores for scores in found.values() if isinstance(scores, dict)]
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for draw, of in (curves, runs), (kl, evaluations), (accuracy, evaluations), (keep, evaluations):
        figure = new_figure(8)
        if of and draw(figure, of) is not False:
            path = Path(args.out) / f"{draw.__name__}.png"
            figure.savefig(path, dpi=120)
            print(path)


if __name__ == "__main__":
    run_script("plot.py", main)
