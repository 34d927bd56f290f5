"""lm-eval (EleutherAI, version 0.4.13) on a checkpoint as trained, and on exported folders by lm-eval's own HF route.

    loglikelihood      sum of ln p(token) over a continuation of a context: multiple choice
    rolling            the same over a whole text, in windows of seq_len tokens that each predict what comes after one token of
                       context: bits per byte = - sum / (ln 2 UTF-8 bytes), as model.measure over the same windows
    generate_until     a continuation, cut where a stop string begins

A text is tokenised behind BOS, as documents are in training, in both routes. One sequence is one forward pass, so that what a
tensor-wide scale sees depends on no other sequence and the numbers on no batch size.

A task is a name, from tasks/ here, from --task-dir, or (--online) of lm-eval's own; or a file of JSON lines, all alike:

    {"text": "..."}                                                bits per byte
    {"context": "...", "choices": ["...", ...], "answer": 0}       multiple choice; a space goes between context and choice

Nothing here reaches the network but with --online. Left out: chat templates, batches, metrics of the package `evaluate`, whose
name is that of our script.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from configs import near
from data import Tokenizer
from evaluation.exported import loadable
from model import GPT

EXAMPLES = Path(__file__).parent / "tasks"
FORMS = ("text",), ("context", "choices", "answer")
SWITCHES = {  # environment, and where a library has read it already
    "HF_HUB_OFFLINE": ("huggingface_hub.constants", "HF_HUB_OFFLINE"),
    "HF_DATASETS_OFFLINE": ("datasets.config", "HF_HUB_OFFLINE"),
    "TRANSFORMERS_OFFLINE": ("transformers.utils.hub", "_is_offline_mode"),
}


def offline() -> None:
    """No library of Hugging Face asks the network from now on, whether imported already or later."""
    for variable, (module, name) in SWITCHES.items():
        os.environ[variable] = "1"
        if module in sys.modules and hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, True)


# --- tasks ---


def rows_of(file: Path) -> list[dict]:
    """The documents of a file of JSON lines. Raises ValueError, with the line, if one is of neither form or of another."""
    try:
        lines = [(number, line) for number, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    rows, form = [], None
    for number, line in lines:
        place = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: no JSON ({error})") from None
        if not isinstance(row, dict) or tuple(row) not in [*FORMS] and {*row} not in [{*keys} for keys in FORMS]:
            wrong = next((key for key in row if key not in sum(FORMS, ())), None) if isinstance(row, dict) else None
            hint = near(wrong, sum(FORMS, ())) if wrong else ""
            raise ValueError(f'{place}: expected {{"text"}} or {{"context", "choices", "answer"}}, not {line[:60]}{hint}')
        if form and {*row} != form:
            raise ValueError(f"{place}: has {sorted(row)}, the lines before it {sorted(form)}; a file is one task")
        form = {*row}
        if "text" in row:
            good = isinstance(row["text"], str) and row["text"]
            wanted = "a text that is not empty"
        else:
            choices, answer = row["choices"], row["answer"]
            good = isinstance(row["context"], str) and isinstance(choices, list) and len(choices) > 1
            good = good and all(isinstance(c, str) and c for c in choices) and type(answer) is int
            good = good and 0 <= answer < len(choices)
            wanted = "a context, two or more choices that are texts, and the answer's index from 0"
        if not good:
            raise ValueError(f"{place}: expected {wanted}, not {line[:60]}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no line in it")
    return rows


ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "text",
    "metric_list": [{"metric": "bits_per_byte"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean"}, {"metric": "acc_norm", "aggregation": "mean"}],
}


def config_of(file: Path) -> dict:
    """A file of JSON lines as a task config of lm-eval, named like the file."""
    from datasets import Dataset

    rows = rows_of(file)

    def dataset(**metadata):
        return {"test": Dataset.from_list(rows)}

    form = ROLLING if "text" in rows[0] else CHOICE
    return {"task": file.stem, "custom_dataset": dataset, "test_split": "test", **form}


def load_tasks(names: list[str], folder: Path | None = None, metadata: dict | None = None, online: bool = False) -> Callable:
    """() -> lm-eval's tasks {name: Task}, made anew at each call, since an evaluation leaves its requests in them.

    Raises ValueError for an unknown name, a folder that is not there, and a task that cannot be built, each in a sentence.
    """
    if not online:
        offline()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        import lm_eval.api.task
        from lm_eval.config.task import TaskConfig
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise ValueError(f"--tasks needs lm-eval, as pyproject.toml pins it ({error})") from None
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)  # a bar for every task and model, of something that takes no time
    if folder and not folder.is_dir():
        raise ValueError(f"--task-dir {folder}: no such folder")
    folders = [EXAMPLES, *([folder] if folder else [])]
    places: dict[str, Path] = {}
    for file in (
        sorted(folder.rglob("*.yaml")) if folder else ()
    ):  # lm-eval passes over what it cannot read, and over the second
        try:
            name = load_yaml(file, resolve_func=False).get("task")
        except Exception as error:  # of YAML, or of files it includes
            raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
        if isinstance(name, str) and places.setdefault(name, file) != file:
            raise ValueError(f"{file}: the task {name!r} is that of {places[name]} too")
    manager = TaskManager(include_path=folders, include_defaults=online, metadata=metadata)
    wanted = []
    for name in names:
        if name.endswith((".jsonl", ".json")):
            wanted.append(config_of(Path(name)))
        elif name in manager.all_tasks:
            wanted.append(name)
        else:
            more = "" if online else " (lm-eval's own, which it downloads, with --online)"
            raise ValueError(f"--tasks {name}: no such task{more}{near(name, manager.all_tasks)}")

    def load() -> dict:
        found = {}
        for each in wanted:
            name = each if isinstance(each, str) else each["task"]
            try:
                tasks = manager.load([each])["tasks"]
            except Exception as error:  # anything: task files are programs
                text = " ".join(str(error).split())
                entry = manager.task_index.get(name)
                keys = [key for key in (entry.cfg or {}) if key not in TaskConfig.__annotations__] if entry else []
                keys = [key for key in keys if key in text]
                hint = near(keys[0], TaskConfig.__annotations__) if keys else ""
                place = entry.yaml_path if entry else name
                raise ValueError(f"task {name!r} ({place}): {type(error).__name__}: {text[:300]}{hint}") from None
            if twice := found.keys() & tasks.keys():
                raise ValueError(f"--tasks {name}: {min(twice)!r} is asked twice, or two files have its name")
            found |= tasks
        return found

    return load


# --- models ---


def checkpoint_model(model: GPT, tokenizer: Tokenizer):
    """The model, as it is now, as lm-eval sees one."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class Checkpoint(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            """BOS: it begins every document, and so ends the one before it."""
            return tokenizer.bos

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
            return tokenizer.encode(string, bos=add_special_tokens is not False)

        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = True) -> list[float]:
            T = model.config.seq_len
            totals = []
            for request in requests:
                windows = get_rolling_token_windows(tokenizer.encode(request.args[0]), tokenizer.bos, T, 1)
                scores = [scored(model, *make_disjoint_window(pair)) for pair in windows]
                totals.append(sum(score for score, _ in scores))
            return totals

        def _loglikelihood_tokens(self, requests, **_) -> list[tuple[float, bool]]:
            found = []
            for (_, text), context, tokens in requests:
                if not tokens:
                    raise ValueError(
                        f"a continuation, {text[:40]!r}, has no token of its own: it is one with its context's last"
                    )
                found.append(scored(model, context, tokens))
            return found

        def generate_until(self, requests, disable_tqdm: bool = True) -> list[str]:
            return [generated(model, tokenizer, *request.args) for request in requests]

    return Checkpoint()


@torch.no_grad()
def scored(model: GPT, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    """(ln p(tokens | context), whether each token is the likeliest); what the window cannot hold of the context is left out.
    Raises ValueError if it cannot hold the tokens."""
    T, n = model.config.seq_len, len(tokens)
    if n > T:
        raise ValueError(f"a continuation of {n} tokens is longer than the model's window of {T}")
    window = torch.tensor([(context + tokens)[-T - 1 :]], device=model.norm.weight.device)
    logits, y = model(window[:, :-1])[0, -n:].to(torch.float32), window[0, -n:]
    return -float(F.cross_entropy(logits, y, reduction="none").double().sum()), bool((logits.argmax(-1) == y).all())


def generated(model: GPT, tokenizer: Tokenizer, context: str, options: dict) -> str:
    """What lm-eval's options (until, max_gen_toks, do_sample, temperature, top_p) make of a context."""
    until = options.get("until") or []
    temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
    prompt = tokenizer.encode(context, bos=True)
    count, top_p = int(options.get("max_gen_toks", 256)), float(options.get("top_p") or 1.0)
    ids = model.sample(prompt, count, temperature, top_p=top_p, end=tokenizer.bos)[len(prompt) :]
    text = tokenizer.decode(ids)
    return text[: min([text.find(stop) for stop in [until] * isinstance(until, str) or until if stop in text], default=None)]


def exported_model(folder: Path, seq_len: int):
    """A folder of export.py by lm-eval's HFLM, a sequence at a time. Raises ValueError if it is none."""
    loadable(folder)
    try:
        import transformers
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ValueError(
            f"--exported with --tasks needs transformers and accelerate, as pyproject.toml pins them ({error})"
        ) from None

    transformers.utils.logging.set_verbosity_error()  # (it warns of texts longer than a window, which are cut into windows)
    transformers.utils.logging.disable_progress_bar()

    class Folder(HFLM):
        def loglikelihood(self, requests, disable_tqdm: bool = True):
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = True):
            self.add_bos_token = False  # windows begin with the prefix token, BOS: a second one would be predicted from it
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.add_bos_token = True

        def _loglikelihood_tokens(self, requests, disable_tqdm: bool = True, override_bs: int | None = None):
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    given = {"dtype": "bfloat16", "device": "cpu", "batch_size": 1, "max_length": seq_len, "add_bos_token": True}
    given["softmax_dtype"] = "float32"  # it sums ln p in the dtype of the logits otherwise: 8e-4 of a loss, in BF16
    return Folder(pretrained=str(folder), **given)


# --- results ---


class Result(NamedTuple):
    task: str
    metric: str
    value: float
    error: float | None  # standard error of the mean, where lm-eval has one
    count: int  # documents
    chance: float | None  # of a guess, for multiple choice: the mean of 1 / choices


def run(lm, load: Callable, limit: int | None) -> list[Result]:
    """Every metric of every task. Raises ValueError where a task fails, with its name."""
    from lm_eval.evaluator import evaluate

    results, once = [], {"bootstrap_iters": 1000}  # (for the few metrics whose error is not a formula)
    for name, task in load().items():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
        try:
            found = evaluate(lm, {"tasks": {name: task}, "groups": {}, "group_map": {}}, limit=limit, log_samples=False, **once)
        except Exception as error:  # as above
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"task {name!r}: {kind}{' '.join(str(error).split())[:300]}") from error
        numbers = found["results"][name]
        chance = None
        if task.OUTPUT_TYPE == "multiple_choice" and not task.multiple_input:
            sizes = [len(task.doc_to_choice(doc)) for _, doc in task.doc_iterator(limit=limit)]
            chance = sum(1 / size for size in sizes) / len(sizes)
        for key, value in numbers.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = numbers.get(f"{metric}_stderr,{filtered}")
            error = error if isinstance(error, float) else None
            what = chance if metric.startswith("acc") else None
            results.append(Result(name, metric, float(value), error, found["n-samples"][name]["effective"], what))
    return results


def table(rows: dict[str, list[Result]]) -> list[str]:
    """{model: its results} as lines: a line for each task and metric, a column for each model."""
    names = [name if len(name) <= 20 else f"...{name[-17:]}" for name in rows]
    width = max(12, *(len(name) - 7 for name in names))
    lines = [f"{'task':24}{'metric':>14}{'documents':>11}{'chance':>8}" + "".join(f"{name:>{width + 9}}" for name in names)]
    for same in zip(*rows.values(), strict=True):
        first = same[0]
        chance = "" if first.chance is None else f"{first.chance:.3f}"
        line = f"{first.task:24}{first.metric:>14}{first.count:>11}{chance:>8}"
        for result in same:
            error = "" if result.error is None else f" +-{result.error:.3f}"
            line += f"{result.value:{width}.4f}{error:9}"
        lines.append(line.rstrip())
    return lines
