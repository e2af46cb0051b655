"""Ranks that meet, checkpoints, resume, the log: what the trainers keep beside their loops.

A checkpoint is step-N, a Hugging Face folder that can be served or uploaded as it is (weights,
tokenizer, model card, trainer.json), and trainer/step-N: fp32 weights and optimizer, sharded.
"""

import atexit
import gc
import json
import os
import pickle
import re
import secrets
import shutil
import signal
import sys
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from reagent.config import flat, left_of_run, run_facts
from reagent.folder import check_digest, claim, read_json, write_digest, write_whole, writing
from reagent.policy import Policy, check_model, full_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# with LoRA the frozen base is not saved: what is asked for and missing fails while it is read
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)
CARD = Path(__file__).with_name("model_card.md")
MOST_SKIPS = 5  # steps in a row that bring no update, before a run stops

# ---------------------------------------------------------------- processes


def local_device() -> torch.device:
    """This rank's card, or the CPU where there is none."""
    cuda = torch.cuda.is_available()
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")


def init_distributed(timeout_s: float) -> tuple[int, int, torch.device]:
    """Joins torchrun's process group or starts one of one; (rank, world size, device)."""
    device = local_device()
    cuda = device.type == "cuda"
    if cuda:
        if device.index >= (cards := torch.cuda.device_count()):
            raise SystemExit(f"LOCAL_RANK {device.index} has no card here: a rank each, of {cards}")
        if "OMP_NUM_THREADS" not in os.environ:
            # as under torchrun. vLLM would set it in its own thread and that of backward alone, for
            # which blocks compiled with another number of threads would be compiled again
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
        # packed batches differ in length; vLLM switches this off around the memory that sleeps
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.cuda.set_device(device)
    elif Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        say("there is a card, but torch cannot use it (CUDA 13: driver 580): this runs on the CPU")
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **alone)
    return dist.get_rank(), dist.get_world_size(), device


@atexit.register
def end_gloo() -> None:
    """At exit: gloo's threads end before Python does. torch's caches of DTensor specs keep meshes,
    which keep their groups after destroy_process_group; a thread that lets go of a tensor while
    Python shuts down aborts the process ("terminate called without an active exception")."""
    if dist.is_initialized():
        dist.destroy_process_group()
    for mesh in [x for x in gc.get_objects() if type(x) is DeviceMesh]:
        getattr(mesh, "_pg_registry", {}).clear()  # torch before 2.13 kept names only
    gc.collect()


def say(what: str) -> None:
    """Tells on rank 0 what is done now."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(what, flush=True)


def meet(phase: str, group, timeout_s: float, error: BaseException | None = None) -> None:
    """All ranks meet on the gloo `group` after `phase`; who is missing after `timeout_s` is named.
    A rank that failed passes its `error`, prints where that was, and all stop with its text."""
    if error is not None and not isinstance(error, SystemExit):
        traceback.print_exception(error)
    try:
        dist.monitored_barrier(group, timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as lost:
        told = f"a rank is missing after {phase}: {lost}"
        raise SystemExit(f"rank {dist.get_rank()} stops: {told}") from error or lost
    texts: list = [None] * dist.get_world_size()
    text = "" if error is None else "".join(traceback.format_exception_only(error)).strip()
    dist.all_gather_object(texts, text.removeprefix("SystemExit: "), group=group)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(texts) if text]
    if failed:
        raise SystemExit(f"{phase} failed on " + "; ".join(failed)) from error


@contextmanager
def together(name: str, meet_all):
    """All ranks meet after what is done here; where it failed on one, all stop with its words."""
    error = None
    try:
        yield
    except CheckpointException as several:  # of DCP, and no Exception: what failed first
        error = next(iter(several.failures.values()))[0]
    except (Exception, SystemExit) as problem:
        error = problem
    meet_all(name, error)


def sum_over_ranks(numbers: list[float], group=None) -> list[float]:
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total, group=group)
    return total.tolist()


def engine_group(tensor_parallel: int, timeout_s: float):
    """The gloo group of the adjacent ranks that share this one's engine; None: it has its own."""
    if dist.get_world_size() % tensor_parallel:
        what = f"engine.tensor_parallel = {tensor_parallel}"
        raise SystemExit(f"{what} does not divide {dist.get_world_size()} ranks")
    options = dict(timeout=timedelta(seconds=timeout_s), backend="gloo")
    return dist.new_subgroups(tensor_parallel, **options)[0] if tensor_parallel > 1 else None


# ---------------------------------------------------------------- checkpoints


def checkpoints(folder: str | Path) -> list[Path]:
    """Finished checkpoints, oldest first: a folder takes its name only when it is whole."""
    named = Path(folder).glob("step-*/trainer.json")
    whole = [path.parent for path in named if re.fullmatch(r"step-\d{6,}", path.parent.name)]
    return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))


def state_of(checkpoint: Path) -> Path:
    return checkpoint.parent / "trainer" / checkpoint.name


def trained_state(policy: Policy, optimizer) -> dict:
    parts = get_state_dict(policy, optimizer, options=TRAINED)
    return dict(zip(("model", "optimizer"), parts))


def save_checkpoint(
    folder, step: int, policy: Policy, optimizer, tokenizer, facts: dict, meet_all, dtype=None
) -> Path:
    """Writes both parts of step-NNNNNN beside their final names, flushes, renames: a kill at any
    instant leaves only whole ones.
    `facts` goes to trainer.json; `meet_all(phase, error)` stops all ranks together when one could
    not write; dtype: of the Hugging Face folder, fp32 unless given."""
    final, dtype = Path(folder) / f"step-{step:06d}", dtype or torch.float32
    part, state = final.with_suffix(".tmp"), state_of(final).with_suffix(".tmp")
    rank, hf = dist.get_rank(), policy.hf
    with together("clearing the checkpoint folder", meet_all):
        for path in (part, state) if rank == 0 else ():
            shutil.rmtree(path, ignore_errors=True)
    weights = {name: whole.cpu() for name, whole in full_weights(policy, dtype) if rank == 0}
    if hf.lm_head.weight is hf.model.embed_tokens.weight:  # tied: one copy, on any number of ranks
        weights.pop("lm_head.weight", None)
    try:
        with together(f"saving {final}", meet_all):  # a full disk shows up as many types
            states = trained_state(policy, optimizer)
            with warnings.catch_warnings():  # DCP warns that gloo stages nothing asynchronously
                warnings.simplefilter("ignore")
                dcp.save(states, checkpoint_id=state)
            mine = [*state.glob(f"__{rank}_*")]
            if rank == 0:
                hf.save_pretrained(part, state_dict=weights)
                named = read_json(part / "config.json") | {"dtype": str(dtype).partition(".")[2]}
                (part / "config.json").write_text(json.dumps(named, indent=2))
                tokenizer.save_pretrained(part)
                (part / "README.md").write_text(model_card(step, facts))
                (part / "trainer.json").write_text(json.dumps({"step": step, **facts}, indent=1))
                mine += [*part.glob("*.safetensors"), state / ".metadata"]
            for path in mine:
                write_digest(path)
    except SystemExit:
        for path in (part, state):
            shutil.rmtree(path, ignore_errors=True)
        raise
    with together(f"renaming {part}", meet_all):
        # the state first: a Hugging Face folder without one is no checkpoint
        for path, name in ((state, state_of(final)), (part, final)) if rank == 0 else ():
            for written in [*path.rglob("*"), path]:
                handle = os.open(written, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            shutil.rmtree(name, ignore_errors=True)
            path.rename(name)
    return final


def model_card(step: int, facts: dict) -> str:
    """README.md of a Hugging Face folder: what it was made from, by what, and its last figures."""
    config, log = facts.get("config", {}), facts.get("log") or [{}]
    last = {key: value for key, value in log[-1].items() if isinstance(value, (int, float))}
    told = {key: config.get(key) for key in ("out_dir", "model", "data")}
    told["script"] = Path(facts.get("command", ["?"])[0]).name
    told["figures"] = "".join(f"| {key} | {value:.6g} |\n" for key, value in last.items())
    told["settings"] = json.dumps(config, indent=1)
    return CARD.read_text("utf-8").format(step=step, git=facts.get("git"), **told)


def load_checkpoint(folder: Path, policy: Policy, optimizer, meet_all) -> dict:
    """Restores sharded parameters and optimizer in place; returns trainer.json. All ranks stop
    together where a file is damaged or not ours; no code of the checkpoint runs."""
    trainer = state_of(Path(folder))
    with together(f"reading {folder}", meet_all):
        check_digest(trainer / ".metadata")
        reader = PlainReader(trainer)
        for path in sorted(trainer.glob("*.distcp"))[dist.get_rank() :: dist.get_world_size()]:
            check_digest(path)
    states = trained_state(policy, optimizer)
    with together(f"loading {folder}", meet_all):
        dcp.load(states, storage_reader=reader, planner=PlainPlanner())
    for saved, own in zip(states["optimizer"]["param_groups"], optimizer.param_groups):
        saved["fused"] = own.get("fused")  # as this device computes, not the one that saved
    found = dict(model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    set_state_dict(policy, optimizer, **found, options=TRAINED)
    return read_json(Path(folder) / "trainer.json", "step")


class PlainIndex(pickle.Unpickler):
    """torch keeps the index of a checkpoint as a pickle. Of all that a pickle can name, only the
    records of such an index are taken: to call them makes a record, whatever it holds."""

    TAKEN = {
        "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta "
        "TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
        "_MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.serialization": "_get_layout",
        "torch": "Size float32 bfloat16 float16 float64 int64 int32 uint8 bool",
        "pathlib": "PosixPath",
        "pathlib._local": "PosixPath",
    }

    def find_class(self, module: str, name: str):
        if name not in self.TAKEN.get(module, "").split():
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class PlainReader(FileSystemReader):
    """Reads the index at once: SystemExit where it is not one of ours."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        try:
            with open(folder / ".metadata", "rb") as file:
                self.index = PlainIndex(file).load()
            if not isinstance(self.index, Metadata):
                raise ValueError(f"it holds a {type(self.index).__name__}")
            for shard in self.index.storage_data.values():
                if not re.fullmatch(r"__\d+_\d+\.distcp", shard.relative_path):
                    raise ValueError(f"it names the file {shard.relative_path!r}")
        except Exception as error:  # a pickle that is not one fails in any way
            why = f"{type(error).__name__}: {error}"
            raise SystemExit(f"{folder} is not a checkpoint of this trainer ({why})") from error

    def read_metadata(self, *args, **kwargs) -> Metadata:
        self.index.storage_meta.load_id = self.load_id
        return self.index


class PlainPlanner(DefaultLoadPlanner):
    """torch reads what is no tensor (numbers of the optimizer) with a pickle that may run code."""

    def load_bytes(self, read_item, value) -> None:
        plain = torch.load(value, weights_only=True)
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


def check_resume(saved: dict, config: dict, may_change: set[str], folder) -> None:
    """Refuses a changed key that changes the math, by name; servers may have moved."""
    saved, config = flat(saved), flat(config)
    changed = []
    for key, now in config.items():
        before = saved.get(key)
        moved = all(str(v).startswith(("http://", "https://")) for v in (before, now))
        if key not in may_change and before != now and not moved:
            changed.append(f"{key}: {before!r} -> {now!r}")
    if changed:
        told = f"{folder} holds a run with other settings ({', '.join(changed)})"
        raise SystemExit(f"{told}: give another --out_dir or restore them")


def prune(folder, keep_last: int, best_step: int | None) -> None:
    """Deletes what a kill left, and all steps but the newest `keep_last` (0: all) and the best."""
    found = checkpoints(folder)
    kept = {path.name for path in found[-keep_last:]} | {f"step-{best_step or 0:06d}"}
    left = [path for path in [*found, *Path(folder).glob("trainer/*")] if path.name not in kept]
    for path in [*left, *Path(folder).glob("step-*.tmp")]:
        shutil.rmtree(path)


def asked_to_stop() -> list[bool]:
    """Empty until SIGTERM (preemption) or a Ctrl-C: the phase of the step then ends, what is done
    is saved, and the run ends. A second Ctrl-C kills.
    torchrun passes both on to its ranks and kills those that are still there 30 s later, or after
    its --shutdown-timeout."""
    asked: list[bool] = []

    def remember(*_):
        asked.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return asked


# ---------------------------------------------------------------- the bookkeeping of a trainer


# keys that leave the math of a run alone
MAY_CHANGE = set(
    "out_dir save_interval log_interval keep_last timeout_s check wandb engine.memory_share "
    "engine.sleep policy.attention policy.tokens_per_microbatch policy.checkpoint_activations "
    "policy.cpu_offload policy.shard_ranks policy.save_dtype".split()
)


class Run:
    """What a trainer keeps beside its loop: ranks, folder, log, checkpoints, the wish to stop.
    The loop calls it; it never calls the loop. `cfg` is the trainer's config, `may_change` its keys
    besides MAY_CHANGE that a resumed run may change; `steps` too where no schedule hangs on it."""

    def __init__(self, cfg, may_change: set[str]):
        if cfg.wandb and not find_spec("wandb"):
            raise SystemExit("wandb = True, but it is not installed: pip install wandb")
        self.cfg = cfg
        self.may_change = MAY_CHANGE | may_change | ({"steps"} if cfg.lr_end == 1.0 else set())
        self.rank, self.world, self.device = init_distributed(cfg.timeout_s)
        if self.world % ((ranks := cfg.policy.shard_ranks) or 1):
            raise SystemExit(f"policy.shard_ranks = {ranks} does not divide {self.world} ranks")
        self.gloo = dist.new_group(backend="gloo")
        self.sampler_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.out, self.saved = Path(cfg.out_dir), 0
        self.lock = self.on_first_rank("opening out_dir", claim, self.out, 0, cfg.check)
        self.facts, self.log, self.skips = run_facts(cfg), [], 0
        self.facts["wandb"] = secrets.token_hex(4) if cfg.wandb else None  # id of the run there
        self.best: dict = {"step": None, "accuracy": -1.0}
        self.tracker, self.stop_asked = None, []
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.has_bar = self.rank == 0 and sys.stderr.isatty()
        check_model(cfg.model)
        self.newest = self.find_newest()

    def on_first_rank(self, phase: str, work, *args):
        """work(*args) on rank 0; where it fails all ranks stop together."""
        with self.together(phase):
            return None if self.rank else work(*args)

    def find_newest(self) -> Path | None:
        """The checkpoint to go on from; SystemExit where a key that changes the math differs."""
        if not (found := checkpoints(self.out)):
            return None
        if not state_of(found[-1]).is_dir():
            raise SystemExit(f"{found[-1]} has no {state_of(found[-1])} to go on from")
        saved = read_json(found[-1] / "trainer.json", "step", "config", "log")
        check_resume(saved["config"], self.facts["config"], self.may_change, found[-1])
        self.log, self.best, self.saved = saved["log"], saved.get("best", self.best), saved["step"]
        self.facts["wandb"] = saved.get("wandb") or self.facts["wandb"]
        return found[-1]

    def only_checks(self, counts: dict[str, int]) -> bool:
        """All is checked, nothing heavy loaded: says what is left of the run. True with --check:
        that was all, and nothing was written."""
        times = [line["seconds/step"] for line in self.log if "seconds/step" in line]
        say(left_of_run({"steps": self.cfg.steps - self.saved} | counts, times))
        if self.cfg.check:
            say("checked: it can start")
            self.end()
        return self.cfg.check

    def meet(self, phase: str, error: BaseException | None = None) -> None:
        meet(phase, self.gloo, self.cfg.timeout_s, error)

    @contextmanager
    def phase(self, name: str):
        """A collective that fails says no name: all that live meet, and who is missing is named."""
        try:
            yield
        except RuntimeError as error:
            self.meet(name, error)
            raise

    def together(self, name: str):
        return together(name, self.meet)

    def sum(self, numbers: list[float]) -> list[float]:
        return sum_over_ranks(numbers, self.gloo)

    def gather(self, item) -> list:
        """One item of each rank, on every rank."""
        items = [None] * self.world
        dist.all_gather_object(items, item, group=self.gloo)
        return items

    def resume(self, policy: Policy, optimizer) -> int:
        """Restores the newest checkpoint, if there is one; returns how many steps are done."""
        if self.newest:
            say(f"going on from {self.newest}")
            load_checkpoint(self.newest, policy, optimizer, self.meet)
        return self.saved

    def begin(self, what: str) -> None:
        """Writes what the run is and its log so far; from here on signals are remembered."""
        self.stop_asked = asked_to_stop()
        if self.rank:
            return
        write_whole(self.out / "run.json", json.dumps(self.facts, indent=1))
        write_whole(self.out / "log.jsonl", (json.dumps(line) + "\n" for line in self.log))
        print(f"{what} -> {self.out}", flush=True)
        if self.cfg.wandb:
            import wandb

            known = dict(id=self.facts["wandb"], resume="allow", config=self.facts["config"])
            self.tracker = wandb.init(project="reagent", name=self.cfg.out_dir, **known)

    def steps(self, start: int):
        """The steps that are left, with a bar on a terminal."""
        steps = range(start, self.cfg.steps)
        return tqdm(steps, initial=start, total=self.cfg.steps, disable=not self.has_bar)

    def bar(self, what: str, total: int):
        """Rank 0's bar with the time left; without a terminal a line in 30 s, if it takes long."""
        slow = {} if self.has_bar else dict(delay=30.0, mininterval=30.0)
        return tqdm(desc=what, total=total, leave=False, disable=self.rank > 0, **slow)

    def write(self, line: dict, shown: tuple[str, ...] = (), quiet: bool = False) -> None:
        """Appends a line to the log and prints the `shown` keys of it."""
        self.log.append(line)
        if self.rank:
            return
        with writing(path := self.out / "log.jsonl"), open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.tracker:
            self.tracker.log(line)
        if not quiet:
            known = [key for key in shown if isinstance(line.get(key), (int, float))]
            text = "  ".join(f"{key} {line[key]:.4g}" for key in known)
            alarms = [key for key in ("skipped", "alarm") if line.get(key)]
            text += "".join(f"  {key.upper()}: {line[key]}" for key in alarms)
            tqdm.write(f"step {line['step']:5d}  {text}  {line['seconds/step']:.1f} s")

    def count_skip(self, step: int, why: str) -> None:
        """Counts skipped steps in a row; SystemExit on the first step and after MOST_SKIPS."""
        self.skips = self.skips + 1 if why else 0
        if why and (step == 0 or self.skips > MOST_SKIPS):
            last = (checkpoints(self.out) or ["none"])[-1]
            told = f"{why} ({self.skips} in a row); last good checkpoint: {last}"
            raise SystemExit(f"step {step + 1}: {told}")

    def stopping(self) -> bool:
        """Whether any rank was asked to stop."""
        return self.sum([len(self.stop_asked)])[0] > 0

    def gives_up(self, done: int, policy: Policy, optimizer, tokenizer) -> bool:
        """Between the phases of a step: whether a rank was asked to stop. The `done` steps before
        it are saved then; the step itself is repeated when the run goes on."""
        if (stopping := self.stopping()) and done > self.saved:
            self.save(done, policy, optimizer, tokenizer)
        return stopping

    def save(self, step: int, policy: Policy, optimizer, tokenizer) -> None:
        facts = {**self.facts, "log": self.log, "best": self.best}
        own = self.cfg.policy.save_dtype  # auto: as the sampler computes
        given = dict(meet_all=self.meet, dtype=DTYPES.get(own, self.sampler_dtype))
        save_checkpoint(self.out, step, policy, optimizer, tokenizer, facts, **given)
        self.saved = step
        if self.rank == 0:
            prune(self.out, self.cfg.keep_last, self.best["step"])

    def in_background(self, work, *args) -> None:
        """Calls `work` in a thread while the loop goes on; what the call before it raised, now."""
        self.finish_writing()
        self.writing = self.writer.submit(work, *args)

    def finish_writing(self) -> None:
        if self.writing:
            self.writing.result()
            self.writing = None

    def end(self) -> None:
        self.meet("the end")
        dist.destroy_process_group()
        if self.lock:
            self.lock.close()
