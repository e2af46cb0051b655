"""The four released sets of Reagent (Hugging Face hub, user bunny127, Apache-2.0) as the rows that
our trainers read.

    python data/reagent/prepare.py                             # all four sets
    python data/reagent/prepare.py --set=sft --inspect
        # the first records and their keys, nothing is written
    python data/reagent/prepare.py --set=rl --media
        # also the images and audio files, into files_dir
    python data/reagent/prepare.py --set=rrm_sft --input=a.parquet --input=b.jsonl

Written: sft.jsonl (stage 1), rrm_sft.jsonl and rrm_rl.jsonl (stage 2), rl_train.jsonl (stage 3);
the records are those of the README. NAME.meta.json beside each has revision and digests.

The released weights were trained with the prompts that stand in the rows, so these are written to
prompts/SET.system.txt (empty: the rows have no system turn) and, for the reward model's sets,
prompts/SET.request.txt with {question} and {trajectory} in their places; where rows differ, the
commonest is first and the others are SET.system-2.txt and so on. The presets use them.

The schemas of the sets are not documented, so every common
layout is taken (json list, jsonl, parquet):
  sft  messages | conversations (sharegpt) | instruction, input, output (alpaca)
      | prompt or question, response
  rrm_*  question, trajectory, think, critique, score
      | any layout of sft whose reply is the three blocks
  rl  question, ground_truth (or answer), category, meta_info, multimodal_info
      | prompt, reward_model.ground_truth
A record that fits none is counted with its reason; when a file has none that fits, that is an error
naming its keys (but where only its media are missing: those come with --media).
"""

import argparse
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.hotpotqa.prepare import origin, print_table, read_records, write_origin, write_rows
from data.reagent.conversations import Unfit, sft_row, system_of
from data.reagent.hub import download, download_media
from data.reagent.judgments import judged_parts, rrm_row
from data.reagent.tasks import NO_MEDIA, rl_row

# set -> (data set of the hub, file written)
SETS = {
    "sft": ("bunny127/Reagent-SFT-55.6K", "sft.jsonl"),
    "rrm_sft": ("bunny127/Reagent-RRM-SFT-28K", "rrm_sft.jsonl"),
    "rrm_rl": ("bunny127/Reagent-RRM-RL-90K", "rrm_rl.jsonl"),
    "rl": ("bunny127/Reagent-RL-709K", "rl_train.jsonl"),
}
PROMPTS_KEPT = 9  # of each set and kind, the commonest
# what a record may break with, whatever it holds
BROKEN = (KeyError, TypeError, AttributeError, IndexError, RecursionError, json.JSONDecodeError)


def convert(name: str, record, source: str, number: int, files_dir: Path) -> dict:
    """One record of the set `name` as our row; Unfit with the reason where it does not become
    one."""
    if not isinstance(record, dict):
        raise Unfit("not an object")
    try:
        if name == "sft":
            return sft_row(record)
        if name == "rl":
            return rl_row(record, source, number, files_dir)
        return rrm_row(record, for_sft=name == "rrm_sft")
    except BROKEN as error:
        raise Unfit(f"broken inside ({type(error).__name__})") from error


def count_prompts(name: str, record: dict, row: dict, prompts: dict[str, Counter]) -> None:
    """Counts what the model of a converted record read: {"system" | "request": texts}."""
    if name == "rl":
        return
    found = {"system": system_of(row["messages"])} if name == "sft" else judged_parts(record)[3]
    for kind, text in found.items():
        counted = prompts.setdefault(kind, Counter())
        if text in counted or len(counted) < 1000:  # not a prompt of its own for every row
            counted[text] += 1


def told_apart(row: dict, source: Path, seen: dict[str, int]) -> None:
    """Notes the row's id, or raises Unfit; an id that another question has gets the file's name:
    ids restart in files."""
    question = hash(row["question"])
    if seen.get(row["id"]) == question:
        raise Unfit("id seen before")
    if row["id"] in seen:
        row["id"] = f"{source.parent.name}/{source.stem}/{row['id']}"
    if row["id"] in seen:
        raise Unfit("id seen before in its file, with another question")
    seen[row["id"]] = question


def convert_files(
    name: str, paths: list[Path], tallies: dict, files_dir: Path, prompts: dict[str, Counter]
):
    """Yield the rows of all files of a set; a file without one fitting record is an error that
    names its keys. `prompts` counts what stands in the rows: {"system" | "request": texts}."""
    seen: dict[str, int] = {}
    names = Counter(path.name for path in paths)
    for path in paths:
        label = path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
        tally, keys = tallies.setdefault(f"{name}: {label}", Counter()), []
        for number, (_, record) in enumerate(read_records(path), 1):
            tally["read"] += 1
            keys = keys or keys_of(record)
            try:
                row = convert(name, record, path.stem, number, files_dir)
                if "id" in row:
                    told_apart(row, path, seen)
            except Unfit as reason:
                tally[str(reason)] += 1
                continue
            tally["converted"] += 1
            count_prompts(name, record, row, prompts)
            yield row
        if tally["read"] and not tally["converted"]:
            reason = max((key for key in tally if key != "read"), key=tally.__getitem__)
            if reason == NO_MEDIA:
                continue
            told = f"{path}: none of {tally['read']:,} records fits the set {name!r} (most often: "
            told += f"{reason}); keys found: {', '.join(keys)}. --inspect shows the first ones"
            raise SystemExit(told)


def keys_of(record) -> list[str]:
    return sorted(map(str, record)) if isinstance(record, dict) else [type(record).__name__]


def write_prompts(folder: Path, name: str, prompts: dict[str, Counter], rows: int) -> None:
    """The commonest prompts of a set as files, those of an earlier run taken away; prints which."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}.*.txt"):
        old.unlink()
    for kind, counted in prompts.items():
        for place, (text, count) in enumerate(counted.most_common(PROMPTS_KEPT), 1):
            path = folder / (f"{name}.{kind}-{place}.txt" if place > 1 else f"{name}.{kind}.txt")
            path.write_text(text, encoding="utf-8", errors="replace")
            empty = "" if text else " (empty: no system turn)"
            print(f"wrote {path}: the {kind} prompt of {count / rows:.1%} of the rows{empty}")
        if len(counted) > PROMPTS_KEPT:
            print(f"  {name}: {len(counted):,} or more different {kind} prompts, the rest not kept")
    if not prompts and name != "rl":
        print(f"{name}: its rows hold no prompts, so none are written to {folder}")


def inspect(paths: list[Path], count: int = 3) -> None:
    """Print the keys and the first records of each file, long texts cut."""
    for path in paths:
        print(f"== {path}")
        for place, record in islice(read_records(path), count):
            print(f"-- {place}")
            shown = record if isinstance(record, dict) else {"(not an object)": record}
            for key, value in shown.items():
                text = json.dumps(value, ensure_ascii=False, default=str)
                text = text[:300] + " ..." * (len(text) > 300)
                print(f"   {key} ({type(value).__name__}): {text}")


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--set", choices=list(SETS), help="one of the sets (default: all four)")
    add("--input", action="append", default=[], help="a local file, not a download; repeatable")
    add("--out", default=str(HERE), help="folder to write in")
    add("--files_dir", default=str(HERE / "files"), help="where media paths are resolved")
    add("--revision", default="main", help="commit or branch of the hub's data sets")
    add("--media", action="store_true", help="first fetch the media of the RL set into files_dir")
    add("--inspect", action="store_true", help="print the first records of each file and stop")
    args = parser.parse_args(argv)
    if args.input and not args.set:
        raise SystemExit(f"--input needs --set, one of {', '.join(SETS)}")
    if args.media:
        download_media(SETS["rl"][0], args.revision, Path(args.files_dir))

    tallies: dict = {}
    try:
        for name in [args.set] if args.set else SETS:
            repo, file = SETS[name]
            given = {Path(path): "" for path in args.input}
            given = given or download(repo, args.revision, HERE / "raw")
            if args.inspect:
                inspect(list(given))
                continue
            target, prompts = Path(args.out) / file, {}
            rows = convert_files(name, list(given), tallies, Path(args.files_dir), prompts)
            written = write_rows(target, rows)
            if not written:
                raise SystemExit(f"{target}: not written, the files hold no record that fits")
            write_origin(target, written, [origin(url, path) for path, url in given.items()])
            print(f"wrote {written:,} rows to {target}")
            write_prompts(Path(args.out) / "prompts", name, prompts, written)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    finally:
        if tallies:
            print_table(tallies)


if __name__ == "__main__":
    main()

# The names of the sets say 55.6K, 28K, 90K and 709K rows; we know no exact counts. A file with two
# tasks, one of them without an answer, read by --set=rl --input=DeepScaleR_18_6k_5k.json --out=.,
# prints:
#
# wrote 1 rows to rl_train.jsonl
# file                              read converted  skipped
# rl: DeepScaleR_18_6k_5k.json         2         1        1
#   rl: DeepScaleR_18_6k_5k.json: 1 skipped, no question or no ground truth
