"""What the README promises: its commands, its forks, its links."""
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from model import Llama
from router import capacity, load_routers, threshold_for
from support.checked import open_router_file
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_setup_commands_are_one_line_each():
    for end in "python train_router.py", "python -m pytest":
        assert re.search(rf"^pip install -r \S+ && {re.escape(end)}$", README, re.M)


def test_the_fork_runs(arguments, tmp_path):
    """A gate of its own, tuned and evaluated; scripts that do not know it refuse its file by name."""
    def run(*command):
        command = [sys.executable, *map(str, command)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    fork, tiny = ROOT / "examples" / "last_token.py", arguments[1]
    done = run(fork, "train_router", *arguments, "--granularity", "attn_sequence")
    assert done.returncode == 0 and "perplexity" in done.stdout, done.stderr
    flags = ["--model", tiny, "--routers", tmp_path / "out" / "routers.safetensors", "--tasks", "rte",
             "--limit", 2, "--data-dir", ROOT / "data" / "questions"]
    done = run(fork, "eval", *flags)
    assert done.returncode == 0 and "routed" in done.stdout, done.stderr
    done = run(ROOT / "eval.py", *flags)
    assert done.returncode == 1 and "'last_token'" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run(fork, "train_router", *arguments)                     # tokens have no prompt to read
    assert done.returncode == 1 and "sequence" in done.stderr and "Traceback" not in done.stderr
    assert run(fork).returncode == 1


def test_shipped_files_give_the_capacities_that_are_promised():
    page = (ROOT / "routers" / "README.md").read_text("utf-8")
    ranges = dict(re.findall(r"([\d.]+ to [\d.]+) at (token|sequence) level", page))
    (in_readme,) = re.findall(r"any from ([\d.]+ to [\d.]+)", README)
    for text, level in [*ranges.items(), (in_readme, "token")]:
        path = ROOT / "routers" / f"smollm2-135m.attn_{level}.safetensors"
        _, meta = open_router_file(path)
        low, high = (threshold_for(float(end), meta, path) for end in text.split(" to "))
        assert 0 < high < low < 1
    assert len(ranges) == 2


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[!.]*/README.md")]
    assert len(pages) >= 5
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)]*)\)", page.read_text("utf-8")):
            if target.startswith("https://arxiv.org/"):
                continue
            linked = page.parent / target if target else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), f"{page.name}: #{anchor}"


def test_tuned_routers_load_and_do_what_they_say(smollm2):
    tok, model = Tokenizer.from_pretrained("smollm2-135m"), Llama.from_pretrained("smollm2-135m")
    ids = torch.tensor([tok.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])[0]])
    files = sorted((ROOT / "routers").glob("*.safetensors"))
    assert files
    for file in files:
        meta = load_routers(model, file)
        out = model.generate(ids, max_new_tokens=40)
        assert 0.5 < capacity(model) < 1 and len(tok.decode(out[0, ids.shape[1]:]).split()) > 15
        assert meta["command"].strip() in (ROOT / "routers" / "README.md").read_text("utf-8")
        asked = re.search(r"--capacity ([\d.]+)", meta["command"])
        assert abs(json.loads(meta["held_out"])["capacity"] - float(asked[1] if asked else 0.8)) < 0.03
