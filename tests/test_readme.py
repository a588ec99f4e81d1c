"""What the README promises: its commands, its example of a fork, its links."""
import json
import re
import subprocess
import sys
from pathlib import Path

from test_train_router import arguments  # noqa: F401  (a fixture)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def test_setup_commands_are_one_line_each():
    for end in "python train_router.py", "python -m pytest":
        assert re.search(rf"^pip install -r \S+ && {re.escape(end)}$", README, re.M)


def test_the_fork_runs(arguments, tmp_path):  # noqa: F811
    code = re.search(r'```python\n("""Sequence-level gates.*?)```', README, re.S)[1]
    assert len(code.splitlines()) <= 20
    (tmp_path / "last_token.py").write_text(code)
    command = [sys.executable, tmp_path / "last_token.py", *map(str, arguments)]
    command += ["--granularity", "attn_sequence"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert done.returncode == 0, done.stderr
    assert "perplexity" in done.stdout


def test_links_lead_somewhere():
    for name in "README.md", "data/README.md", "routers/README.md":
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text("utf-8")):
            assert target.startswith("https://arxiv.org/") or ((ROOT / name).parent / target).exists(), target


def test_tuned_routers_load_and_do_what_they_say(smollm2):
    import torch

    from model import Llama
    from router import capacity, load_routers
    from tokenizer import Tokenizer

    tok, model = Tokenizer.from_pretrained("smollm2-135m"), Llama.from_pretrained("smollm2-135m")
    ids = torch.tensor([tok.encode_chat([{"role": "user", "content": "Why is the sky blue?"}])[0]])
    files = sorted((ROOT / "routers").glob("*.safetensors"))
    assert files
    for file in files:
        meta = load_routers(model, file)
        out = model.generate(ids, max_new_tokens=40)
        assert 0.5 < capacity(model) < 1 and len(tok.decode(out[0, ids.shape[1] :]).split()) > 15
        assert meta["command"].strip() in (ROOT / "routers" / "README.md").read_text("utf-8")
        asked = re.search(r"--capacity ([\d.]+)", meta["command"])
        assert abs(json.loads(meta["held_out"])["capacity"] - float(asked[1] if asked else 0.8)) < 0.03
