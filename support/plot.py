"""Pictures of tuning runs and of what eval.py and bench.py measured; needs matplotlib.

    python -m support.plot out/metrics.jsonl scores.json bench.json --out pictures

Of the metrics.jsonl of a run: curves.png, loss and capacity against the step. Of the files that eval.py
--json wrote: kl.png, KL to the dense model against overall capacity, a panel per text; accuracy.png, the mean
score of the tasks against it; keep.png, how often each layer ran on each task or text. Of these and of files
that bench.py --json wrote, of the same capacities: tradeoff.png, KL against measured speedup, a panel per
setting, and a table of the speedup at equal KL.
"""
from support.script import run_script  # isort: skip (must come before torch)

import io
import math
from itertools import cycle
from pathlib import Path

from support.cli import Parser, destination
from support.files import InputError, check_destinations, write_file
from support.measurements import equal_kl_table, kl_points, named_tables, read, short, tradeoffs
from support.tasks import TASKS


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
    for name, dots in points.items():
        axes.plot(*zip(*sorted(dots)), marker="o", label=plain(name))
    axes.set(xlabel="overall capacity", ylabel=ylabel, title=title and plain(title))
    axes.legend()


def kl(figure, evaluations):
    points = kl_points(evaluations)
    if not points:
        return False
    for axes, (text, variants) in zip(figure.subplots(1, len(points), squeeze=False)[0], points.items()):
        against_capacity(axes, variants, "KL to dense, nats per token", short(text))


def accuracy(figure, evaluations):
    """The mean over the tasks that all variants of all evaluations have."""
    tables = [(name, table) for name, table in named_tables(evaluations) if table["tasks"]]
    shared = set.intersection(*(set(table["tasks"]) for _, table in tables)) if tables else set()
    if not shared:
        return False
    points = {}
    for name, table in tables:
        metrics = [table["tasks"][task][TASKS[task].metric] for task in sorted(shared)]
        points.setdefault(name, []).append((table["capacity"], 100 * sum(metrics) / len(metrics)))
    against_capacity(figure.subplots(), points, "mean score of the tasks, %")


def keep(figure, evaluations):
    """How often each layer ran: a row per routed model and text or task, with its mean over the layers."""
    rows = {}
    for name, table in named_tables(evaluations):
        for what, layers in table["keep"].items():
            if layers and name not in ("static", "shuffled"):
                mean = sum(layers.values()) / len(layers)
                rows[plain(f"{short(what)}, {name}, {mean:.3f}")] = layers
    if not rows:
        return False
    layers = sorted({int(i) for row in rows.values() for i in row})
    axes = figure.subplots()
    share = [[row.get(str(i), 1.0) for i in layers] for row in rows.values()]
    image = axes.imshow(share, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set_xticks(range(len(layers)), layers, fontsize=7)
    axes.set(xlabel="layer")
    figure.colorbar(image, label="share that ran")


def tradeoff(points):
    """A figure of points, see tradeoffs: a panel per setting, and the legend. A line's colour tells the
    gates, its style the text; the lines to the right win."""
    settings = sorted({setting for by_setting in points.values() for setting in by_setting})
    n_columns = math.ceil(math.sqrt(len(settings) + 1))               # the legend has a place of its own
    n_rows = math.ceil((len(settings) + 1) / n_columns)
    figure = new_figure(1 + 3.5 * n_columns, 0.5 + 3 * n_rows)
    panels = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).flatten()
    colors, lines, most = {}, {}, 0.0                                 # the same in all panels
    for axes, (phase, batch, context) in zip(panels, settings):
        axes.axvline(1, color="grey", linewidth=0.5)
        lines["dense"], = axes.plot(1, 0, "kd", markersize=5)
        for (text, by_setting), style in zip(points.items(), cycle(["-", "--", ":"])):
            for name, dots in sorted(by_setting.get((phase, batch, context), {}).items()):
                color = colors.setdefault(name, f"C{len(colors)}")
                label = plain(f"{name}, {short(text)}")
                lines[label], = axes.plot(*zip(*dots), marker="o", markersize=4, linestyle=style, color=color)
                if name != "static":                                  # whose KL may lie far above
                    most = max(most, *(kl for _, kl in dots))
        what = "a prompt of" if phase == "prefill" else "one token after"
        axes.set(title=f"{what} {context:,} tokens" + f", {batch} rows" * (batch > 1))
    panels[0].set_ylim(top=1.1 * (most or 1))
    for axes in panels[len(settings):]:
        axes.set_axis_off()
    panels[-1].legend(lines.values(), lines.keys(), loc="center")
    figure.supxlabel("speedup over dense")
    figure.supylabel("KL to dense")
    return figure


def plain(name):
    """A name as matplotlib takes it for text, not for a formula."""
    return name.replace("$", r"\$")


def save_figure(figure, path, dpi=120):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    write_file(path, picture.getvalue())


def new_figure(width, height=4.5):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("pictures need matplotlib; pip install matplotlib") from None
    return Figure(figsize=(width, height), layout="constrained")


def main():
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("files", nargs="+", help="metrics.jsonl of runs, what eval.py and bench.py --json wrote")
    p.add_argument("--out", type=destination, default="pictures", help="folder for the pictures")
    args = p.parse_args()
    drawings = {f"{draw.__name__}.png": draw for draw in (curves, kl, accuracy, keep)}
    new_figure(8)                                    # without matplotlib it ends here
    check_destinations(*(Path(args.out) / name for name in (*drawings, "tradeoff.png")))
    contents = {path: read(path) for path in args.files}
    runs = {path: steps for path, steps in contents.items() if isinstance(steps, list)}
    benches = [table for table in contents.values() if "rows" in table]
    evaluations = [table for table in contents.values() if "tasks" in table]
    points = tradeoffs(evaluations, benches)
    if benches and not points:
        raise InputError("no picture of times: give what eval.py --text ... --json wrote of the same routers,"
                         " or --static, too, at capacities down to those that bench.py timed")
    for name, draw in drawings.items():
        figure, data = new_figure(8), runs if draw is curves else evaluations
        if data and draw(figure, data) is not False:
            save_figure(figure, Path(args.out) / name)
            print(Path(args.out) / name)
    if points:
        save_figure(tradeoff(points), Path(args.out) / "tradeoff.png", dpi=100)
        print(Path(args.out) / "tradeoff.png", *equal_kl_table(points), sep="\n")


if __name__ == "__main__":
    run_script("plot.py", main)
