"""The command line: presets and --key=value over a dataclass."""

import dataclasses
import hashlib
import importlib
import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import evaluate
import grpo_unified
import rollout
import sft
import tools
import train_rrm
from reagent.config import check_values, flat, parse_config, run_facts
from reagent.reward_model import RewardModelConfig

ROOT = Path(__file__).parents[2]


@dataclass
class Config:
    model: str = "tiny"  # a folder
    lr: float = 1e-3
    steps: int = 10
    resume: bool = True
    show: bool = False
    limit: int | None = None
    names: list[str] = field(default_factory=list)
    betas: tuple[float, ...] = (0.9, 0.999)


@pytest.fixture
def preset(tmp_path):
    def write(text: str, name: str = "preset.py") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_nothing_given_is_the_defaults():
    assert parse_config(Config, []) == Config()


def test_a_preset_is_python(preset):
    path = preset(
        "# a comment\n_k = 1024\nsteps = 2 * _k\nlr = 3\nnames = ['a']\nbetas = (0.8, 1)\nlimit = "
        "None\n"
    )
    assert parse_config(Config, [path]) == Config(steps=2048, lr=3.0, names=["a"], betas=(0.8, 1.0))


def test_the_later_wins(preset):
    one, two = preset("steps = 1\nlr = 0.1\n", "one.py"), preset("steps = 2\n", "two.py")
    assert parse_config(Config, [one, two]) == Config(steps=2, lr=0.1)
    assert parse_config(Config, [one, two, "--steps=3", "--steps=4"]).steps == 4
    assert parse_config(Config, ["--steps=3", two, one]).steps == 1


@pytest.mark.parametrize(
    ("arg", "key", "value"),
    [
        ("--steps=-1", "steps", -1),
        ("--steps=16_384", "steps", 16384),
        ("--lr=5e-7", "lr", 5e-7),
        ("--lr=1", "lr", 1.0),
        ("--model=a=b", "model", "a=b"),
        ("--model=", "model", ""),
        ("--model=7", "model", "7"),
        ("--show", "show", True),
        ("--resume=False", "resume", False),
        ("--resume=true", "resume", True),
        ("--limit=5", "limit", 5),
        ("--limit=none", "limit", None),
        ("--names=a,b", "names", ["a", "b"]),
        ("--names=", "names", []),
        ("--betas=0.9,1", "betas", (0.9, 1.0)),
    ],
)
def test_text_of_the_command_line_becomes_the_type_of_its_key(arg, key, value):
    found = getattr(parse_config(Config, [arg]), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "arg",
    [
        "--steps=1.5",
        "--steps=",
        "--steps",
        "--steps=True",
        "--lr=fast",
        "--resume=1",
        "--resume=",
        "--limit=x",
        "--betas=0.9,x",
        "--model",
        "--names",
    ],
)
def test_a_value_of_the_wrong_type_ends_the_program_with_key_and_origin(arg):
    key = arg[2:].partition("=")[0]
    with pytest.raises(SystemExit, match=f"command line: {key} = .* is not of type"):
        parse_config(Config, [arg])


@pytest.mark.parametrize(
    "line",
    [
        "steps = 1.0",
        "steps = True",
        "resume = 1",
        "lr = False",
        "model = 3",
        "model = None",
        "limit = 0.5",
        "names = 3",
        "names = [1]",
        "betas = {0.9}",
    ],
)
def test_a_value_of_the_wrong_type_in_a_preset_names_the_file(preset, line):
    path = preset(line)
    with pytest.raises(SystemExit, match=f"{path}: {line.split()[0]} = .* is not of type"):
        parse_config(Config, [path])


def test_an_unknown_key_ends_the_program_with_key_and_origin(preset):
    with pytest.raises(SystemExit, match="command line: unknown key 'stepz'"):
        parse_config(Config, ["--stepz=3"])
    path = preset("import math\nsteps = 1\n")  # an import is a key too, and none of ours
    with pytest.raises(SystemExit, match=f"{path}: unknown key 'math'"):
        parse_config(Config, [path])


@pytest.mark.parametrize("arg", ["steps=3", "-steps=3", "run"])
def test_what_is_neither_preset_nor_key_ends_the_program(arg):
    with pytest.raises(SystemExit, match=f"command line: '{arg}' is neither"):
        parse_config(Config, [arg])


def test_a_missing_or_broken_preset_ends_the_program_with_its_name(preset):
    with pytest.raises(SystemExit, match="no preset nowhere.py"):
        parse_config(Config, ["nowhere.py"])
    for text in ("steps = ", "steps = 1 / 0", "steps = undefined"):
        with pytest.raises(
            SystemExit, match="preset.py: (SyntaxError|ZeroDivisionError|NameError)"
        ):
            parse_config(Config, [preset(text)])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_prints_the_commented_dataclass(capsys, flag):
    with pytest.raises(SystemExit) as end:
        parse_config(Config, ["--steps=3", flag])
    assert end.value.code == 0 and 'model: str = "tiny"  # a folder' in capsys.readouterr().out


def test_the_papers_protocol_is_a_preset_of_evaluation():
    cfg = parse_config(evaluate.Config, [str(ROOT / "config/evaluate_paper.py")])
    assert (cfg.max_turns, cfg.max_tokens_per_attempt, cfg.judged) == (30, 32_768, "all")
    assert (cfg.temperature, cfg.top_p) == (0.6, 0.95)
    released = ROOT / "config/grpo_unified_reagent_release_8b.py"
    assert parse_config(grpo_unified.Config, [str(released)]).prompt_file == cfg.prompt_file


# of the paper (section 4, table 4), its release (clipping, lengths), veRL (moments), and our own
TRAINED = dict(weight_decay=0.01, max_grad_norm=1.0, seed=0)
GRPO = TRAINED | dict(lr=5e-7, lr_end=1.0, clip_low=0.2, clip_high=0.34, max_dlogp=0.05)
AGENT = dict(max_turns=13, max_tokens_per_attempt=11_000, max_new_tokens_per_turn=4096)
REWARD = dict(closeness_weight=0.45, agreement_weight=0.5, critique_weight=0.25, leak_penalty=0.5)
LOSS = dict(pool="joint", drop="equal", loss_agg="seq_mean", old_logps="sampler", kl_coef=0.0)
RECIPES = [
    (sft.Config, TRAINED | dict(rows_per_step=32, steps=3476, lr=1e-5, warmup_steps=50)),
    (sft.Config, dict(model="Qwen/Qwen3-8B", beta1=0.9, beta2=0.999, lr_end=0.1)),
    (train_rrm.Config, GRPO | REWARD | dict(stage="grpo", judgments_per_step=32, steps=2800)),
    (train_rrm.Config, dict(group_size=8, temperature=1.0, max_judgment_tokens=1400)),
    (grpo_unified.Config, GRPO | LOSS | AGENT | dict(variant="u", rrm_weight=0.3, steps=300)),
    (grpo_unified.Config, dict(group_size=8, prompts_per_step=64, prompts_per_minibatch=16)),
    (grpo_unified.Config, dict(temperature=0.7, max_context=32_768, fixed_critique="")),
    (evaluate.Config, dict(temperature=0.6, top_p=0.95, refine=False, judged="table", seed=0)),
    (evaluate.Config, dict(limit=0, rollouts=0, max_turns=0, max_tokens_per_attempt=32_768)),
    (rollout.Limits, AGENT | dict(max_context=32_768, final_tokens=512)),
    (tools.Config, dict(seconds_per_call=30.0, calls_in_flight=16, output_chars=10_000)),
    (tools.Config, dict(unsafe_python=False, replay=False)),
    (RewardModelConfig, dict(max_context=32_768, max_tokens=4096, temperature=0.3)),
    (RewardModelConfig, dict(seconds=600.0, in_flight=64, max_failures=0.2, sleep=False)),
]


@pytest.mark.parametrize("kind, wanted", RECIPES)
def test_the_defaults_are_those_of_the_recipe(kind, wanted):
    assert vars(kind()) | wanted == vars(kind())


def test_the_prompts_of_a_run_are_told_by_file_and_digest(tmp_path):
    (tmp_path / "p.txt").write_text("Judge.")
    flags = [f"--prompt_file={tmp_path}/p.txt", f"--rrm.request_file={tmp_path}/p.txt"]
    facts = run_facts(parse_config(evaluate.Config, flags))["prompts"]
    told = f"{tmp_path}/p.txt, sha256 {hashlib.sha256(b'Judge.').hexdigest()[:12]}"
    assert facts == {
        "prompt_file": told,
        "rrm.prompt_file": "our own",
        "rrm.request_file": told,
    }


@pytest.mark.parametrize("script", ["sft", "train_rrm", "grpo_unified", "evaluate"])
def test_every_preset_parses_for_its_script(script):
    module = __import__(script)
    presets = sorted((ROOT / "config").glob(f"{script}_*.py"))
    assert presets and all(parse_config(module.Config, [str(preset)]) for preset in presets)


def test_the_facts_of_a_run_are_json_and_hold_config_commit_and_versions():
    facts = json.loads(json.dumps(run_facts(Config(steps=3))))
    assert facts["config"]["steps"] == 3 and {"python", "torch", "transformers"} <= set(
        facts["versions"]
    )
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    assert facts["git"] == (git.stdout.strip() or None)
    assert facts["machine"]["cores"] and isinstance(facts["machine"]["gpus"], list)


def test_a_machine_without_git_has_a_run_without_a_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_facts(Config())["git"] is None


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem
)
def test_every_preset_fits_the_script_that_it_is_named_after(preset):
    scripts = ("grpo_unified", "train_rrm", "sft", "evaluate", "trial")
    script = next(name for name in scripts if preset.stem.startswith(name))
    script = "data.trial" if script == "trial" else script
    config = parse_config(importlib.import_module(script).Config, [str(preset)])
    own = getattr(config, "out_dir", None)  # a trial writes nothing
    assert own is None or preset.stem.endswith("8b") or own != type(config)().out_dir


@dataclass(frozen=True)
class Inner:
    where: str = ""
    seconds: float = 60.0


@dataclass
class Outer:
    lr: float = 1.0
    inner: Inner = Inner("here")


def test_a_nested_dataclass_takes_its_first_field_dotted_keys_and_a_dict(tmp_path):
    (tmp_path / "preset.py").write_text("inner = dict(where='there', seconds=5)")
    assert parse_config(Outer, []).inner == Inner("here")
    assert parse_config(Outer, ["--inner=URL"]).inner == Inner("URL")
    given = [f"{tmp_path}/preset.py", "--inner.seconds=7"]
    assert parse_config(Outer, given).inner == Inner("there", 7.0)


@pytest.mark.parametrize(
    "argument, told",
    [
        ("--inner.hours=1", "command line: unknown key 'inner.hours'"),
        ("--lr.x=1", "command line: unknown key 'lr.x'"),
        ("--inner.seconds=soon", "command line: inner.seconds = 'soon' is not of type float"),
    ],
)
def test_a_bad_nested_key_is_named_whole(argument, told):
    with pytest.raises(SystemExit) as stopped:
        parse_config(Outer, [argument])
    assert str(stopped.value).startswith(told)


@pytest.mark.parametrize(
    "script, argument, told",
    [
        ("sft", "--lr=-1e-5", "lr = -1e-05: not below 0"),
        ("sft", "--lr=nan", "lr = nan: not below 0, and finite"),
        ("sft", "--rows_per_step=0", "rows_per_step = 0: above 0"),
        ("sft", "--beta2=1", "beta2 = 1.0: below 1"),
        ("sft", "--save_interval=0", "save_interval = 0: above 0"),
        ("train_rrm", "--temperature=0", "temperature = 0.0: above 0"),
        ("train_rrm", "--group_size=1", "group_size = 1: above 1"),
        ("train_rrm", "--log_interval=0", "log_interval = 0: above 0"),
        ("train_rrm", "--engine.tensor_parallel=0", "engine.tensor_parallel = 0: above 0"),
        ("grpo_unified", "--temperature=0", "temperature = 0.0: above 0"),
        ("grpo_unified", "--group_size=0", "group_size = 0: above 0"),
        ("grpo_unified", "--lr=-1", "lr = -1.0: not below 0"),
        ("grpo_unified", "--lr=inf", "lr = inf: not below 0, and finite"),
        ("grpo_unified", "--prompts_per_minibatch=0", "prompts_per_minibatch = 0: above 0"),
        ("grpo_unified", "--rrm.max_context=-1", "rrm.max_context = -1: not below 0"),
        ("grpo_unified", "--engine.memory_share=1.5", "engine.memory_share = 1.5: at most 1"),
        ("evaluate", "--top_p=0", "top_p = 0.0: above 0"),
        ("evaluate", "--top_p=1.1", "top_p = 1.1: at most 1"),
        ("evaluate", "--temperature=-0.1", "temperature = -0.1: not below 0"),
    ],
)
def test_a_number_out_of_its_bounds_is_told_before_work_starts(script, argument, told):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stopped:
        module.main(parse_config(module.Config, ["--model=out/none", argument]))
    assert str(stopped.value).startswith(told)


@pytest.mark.parametrize("script", ["sft", "train_rrm", "grpo_unified", "evaluate"])
def test_every_number_of_every_script_refuses_what_is_below_0(script):
    module = importlib.import_module(script)
    values = flat(dataclasses.asdict(module.Config()))
    numbers = [key for key, value in values.items() if type(value) in (int, float)]
    for key in numbers:
        if key != "seed":
            with pytest.raises(SystemExit, match=f"^{key} = -1"):
                check_values(parse_config(module.Config, [f"--{key}=-1"]), "")
    assert "lr" in numbers or script == "evaluate"
