"""lm-evaluation-harness on local files: remakes tests/lm_eval_*.json, which test_eval.py compares with.

    python -m venv harness && . harness/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 lm-eval==0.4.13
    model=~/.cache/router-tuning/smollm2-135m
    python tests/run_lm_eval.py $model data/questions tests/lm_eval_0.json
    python tests/run_lm_eval.py $model data/questions tests/lm_eval_2.json --num-fewshot 2 \\
        --tasks arc_challenge,mmlu,winogrande
    python tests/run_lm_eval.py $model data/questions tests/lm_eval_5.json --num-fewshot 5 --tasks gsm8k
    python tests/run_lm_eval.py MODEL BENCHMARKS OUT --tasks arc_challenge --limit 100 --num-fewshot 25

MODEL is a Hugging Face folder, BENCHMARKS a folder with <task>/<split>.jsonl; examples are the first ones.
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import lm_eval
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

HOME = Path(lm_eval.__file__).parent / "tasks"
WHERE = {"arc_challenge": "arc/arc_challenge.yaml", "arc_easy": "arc/arc_easy.yaml",
         "boolq": "super_glue/boolq/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml",
         "hellaswag": "hellaswag/hellaswag.yaml",
         "openbookqa": "openbookqa/openbookqa.yaml", "piqa": "piqa/piqa.yaml", "rte": "glue/rte/default.yaml",
         "winogrande": "winogrande/default.yaml"}
WRITTEN = {"strict": "strict-match", "flexible": "flexible-extract"}         # its names for the extractions
SPLIT = {"arc_challenge": "test", "arc_easy": "test", "gsm8k": "test", "openbookqa": "test", "mmlu": "test"}


def task_files(name, data, folder, limit):
    """Write the harness's task, reading local lines; returns {its name: the lines' numbers}."""
    split = SPLIT.get(name, "validation")
    lines = (data / name / f"{split}.jsonl").read_text().splitlines()[:limit]
    groups = {"": range(len(lines))}
    if name == "mmlu":
        groups = {}
        for i, line in enumerate(lines):
            groups.setdefault(json.loads(line)["subject"], []).append(i)
    for group, numbers in groups.items():
        task = f"local_{name}_{group}"
        files = {split: folder / f"{task}.jsonl"}
        files[split].write_text("".join(lines[i] + "\n" for i in numbers))
        examples = "dev" if name == "mmlu" else "train"
        if (data / name / f"{examples}.jsonl").exists():
            files[examples] = folder / f"{task}.{examples}.jsonl"
            shots = (data / name / f"{examples}.jsonl").read_text().splitlines()
            files[examples].write_text("".join(line + "\n" for line in shots
                                               if json.loads(line).get("subject", "") == group))
        source = HOME / (f"mmlu/default/mmlu_{group}.yaml" if name == "mmlu" else WHERE[name])
        config = {"include": str(source), "task": task, "dataset_path": "json", "dataset_name": None,
                  "dataset_kwargs": {"data_files": {k: str(v) for k, v in files.items()}},
                  "training_split": "train" if "train" in files else None,
                  "validation_split": "validation" if split == "validation" else None,
                  "test_split": "test" if split == "test" else None, "fewshot_config": {"sampler": "first_n"}}
        if name == "mmlu" and "dev" not in files:
            config["fewshot_split"] = None
        (folder / f"{task}.yaml").write_text(yaml.dump(config))
        yield task, numbers


def entry(sample):
    """What the harness says of one question: log-likelihoods, or by an extraction the answer and its mark."""
    if "exact_match" not in sample:
        return {"acc": sample["acc"], "acc_norm": sample.get("acc_norm"),
                "ll": [float(r[0][0]) for r in sample["resps"]]}
    extraction = next(name for name, theirs in WRITTEN.items() if theirs == sample["filter"])
    return {"text": sample["resps"][0][0], extraction: sample["filtered_resps"][0],
            f"{extraction} is right": sample["exact_match"]}


def merged(items):
    """By question: a written answer comes once for each extraction."""
    by_id = {}
    for item in items:
        by_id.setdefault(item["id"], {}).update(item)
    return [by_id[i] for i in sorted(by_id)]


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("model")
    p.add_argument("data", type=Path)
    p.add_argument("out", type=Path)
    p.add_argument("--tasks", default=",".join([*WHERE, "mmlu"]))
    p.add_argument("--limit", type=int)
    p.add_argument("--num-fewshot", type=int, default=0)
    args = p.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token is None:              # the harness wants one, though these tasks never read it
        tokenizer.eos_token = tokenizer.decode([0])
    model = HFLM(args.model, tokenizer=tokenizer, dtype=torch.float32, device="cpu", batch_size=1)
    found, spent = {}, []

    def timed(answer):
        def run(*a, **k):
            start = time.perf_counter()
            result = answer(*a, **k)
            spent.append(time.perf_counter() - start)
            return result
        return run
    model.loglikelihood, model.generate_until = timed(model.loglikelihood), timed(model.generate_until)
    for name in args.tasks.split(","):
        items, spent[:] = [], []
        with tempfile.TemporaryDirectory() as folder:
            for task, numbers in task_files(name, args.data, Path(folder), args.limit):
                manager = TaskManager(include_path=folder)
                result = lm_eval.simple_evaluate(model, tasks=[task], num_fewshot=args.num_fewshot,
                                                 task_manager=manager, log_samples=True, bootstrap_iters=0)
                for sample in result["samples"][task]:
                    items.append({"id": numbers[sample["doc_id"]], **entry(sample)})
        found[name] = {"seconds": sum(spent), "items": merged(items)}
        args.out.write_text(json.dumps(found, indent=1))
        print(name, len(items), "items", f"{sum(spent):.1f} s", flush=True)


if __name__ == "__main__":
    main()
