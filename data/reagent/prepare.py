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
import os
import re
import sys
from collections import Counter
from functools import lru_cache
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.hotpotqa.prepare import (
    fetch,
    origin,
    print_table,
    read_records,
    write_origin,
    write_rows,
)
from reagent.calls import HERMES
from reagent.chat import assistant_text, check_messages
from reagent.reward_model import parse_judgment
from reagent.rows import check_rl_row

# set -> (data set of the hub, file written)
SETS = {
    "sft": ("bunny127/Reagent-SFT-55.6K", "sft.jsonl"),
    "rrm_sft": ("bunny127/Reagent-RRM-SFT-28K", "rrm_sft.jsonl"),
    "rrm_rl": ("bunny127/Reagent-RRM-RL-90K", "rrm_rl.jsonl"),
    "rl": ("bunny127/Reagent-RL-709K", "rl_train.jsonl"),
}
DATA_FILES = (".json", ".jsonl", ".parquet")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
MEDIA = re.compile(
    r"\.(png|jpe?g|gif|webp|bmp|tiff?|wav|mp3|flac|m4a|ogg|pdf|docx?|xlsx?|pptx?|csv|txt|zip)$",
    re.I,
)
RESPONSE = re.compile(r"\s*<tool_response>\n?(.*?)\n?</tool_response>\s*", re.S)
JUDGED = re.compile(
    r"^[ *#]*question[ *]*:[\s*]*(.+?)\s*^[ *#]*"
    r"(?:agent(?:'s)? +)?trajectory(?: of the agent)?[ *]*:[\s*]*(.+)",
    re.S | re.I | re.M,
)
PROMPTS_KEPT = 9  # of each set and kind, the commonest
NO_MEDIA = "its media file is not under files_dir (--media fetches it)"


class Unfit(ValueError):
    """A record that does not become a row; the text is the reason that the table counts."""


# ---------------------------------------------------------------- conversations
def content_text(content) -> str:
    """The text of a message's content, which may be a list of parts; a part that is not text makes
    the record unfit.
    """
    if isinstance(content, list):
        if any(not isinstance(part, dict) or "text" not in part for part in content):
            raise Unfit("a message holds an image or a sound")
        return "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise Unfit("a message is not text")
    return content or ""


def as_call(text: str) -> str:
    """A sharegpt function_call turn (JSON without the tags) as the <tool_call> text of our
    protocol.
    """
    if "<tool_call>" in text:
        return text
    try:
        call = json.loads(text)
    except ValueError as error:
        raise Unfit("a function call is not JSON") from error
    calls = call if isinstance(call, list) else [call]
    if any(not isinstance(one, dict) or "name" not in one for one in calls):
        raise Unfit("a function call has no name")
    return "\n".join(HERMES.write(one["name"], one.get("arguments", {})) for one in calls)


def turns_of(record: dict) -> list[dict]:
    """The turns of a record in any of the layouts, as [{"role", "content", ...}] with the
    publisher's role names.
    """
    listed = record.get("messages") or record.get("conversations") or record.get("conversation")
    reply = next(
        (record[key] for key in ("response", "output", "completion", "chosen") if record.get(key)),
        None,
    )
    if listed is None and isinstance(record.get("prompt"), list):
        listed = record["prompt"] + (
            [{"role": "assistant", "content": reply}] if isinstance(reply, str) else []
        )
    if listed is not None:
        listed = json.loads(listed) if isinstance(listed, str) else listed
        turns = [
            {
                **without_nulls(turn),
                "role": turn.get("role", turn.get("from")),
                "content": turn.get("content", turn.get("value")),
            }
            for turn in listed
        ]
    else:
        question = next(
            (record[key] for key in ("instruction", "prompt", "question") if record.get(key)), None
        )
        if not isinstance(question, str) or not isinstance(reply, str):
            raise Unfit(f"unknown layout, keys {', '.join(map(str, record))}")
        question += "\n" + record["input"] if record.get("input") else ""
        past = [
            {"role": role, "content": text}
            for pair in record.get("history") or []
            for role, text in zip(("user", "assistant"), pair)
        ]
        turns = [
            *past,
            {"role": "user", "content": question},
            {"role": "assistant", "content": reply},
        ]
    if record.get("system") and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": record["system"]}, *turns]
    return turns


def pieces(role: str, text: str) -> list[tuple[str, str]]:
    """A turn cut at its <tool_response> blocks, which become tool turns: rendered as a user's text
    their tags would be broken, and as the agent's they would be trained."""
    cut = [("tool" if i % 2 else role, part) for i, part in enumerate(RESPONSE.split(text))]
    return [(who, part) for who, part in cut if part or who == "tool"] or [(role, text)]


def messages_of(record: dict, cut: bool = True) -> list[dict]:
    """Messages of our protocol: calls as raw text in assistant turns, results in tool turns, no
    assistant turn after another. cut=False leaves turns whole: the request and the judgment of a
    reward model quote <tool_response> blocks, which are no turns."""
    messages: list[dict] = []
    for turn in turns_of(record):
        role, text = ROLES.get(turn["role"], turn["role"]), content_text(turn["content"])
        if role == "call":
            role, text = "assistant", as_call(text)
        elif role == "assistant":
            text = assistant_text({**turn, "content": text})
        whole = not cut or role not in ("user", "tool", "assistant")
        for who, part in [(role, text)] if whole else pieces(role, text):
            if who == "assistant" and messages and messages[-1]["role"] == "assistant":
                messages[-1]["content"] += "\n" + part
            else:
                messages.append({"role": who, "content": part})
    return messages


def without_nulls(value):
    """`value` without the null keys of its objects: a parquet file gives every call and schema the
    keys of all others.
    """
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return (
        {k: without_nulls(v) for k, v in value.items() if v is not None}
        if isinstance(value, dict)
        else value
    )


def schemas_of(tools) -> list[dict]:
    """Tool schemas, a list or its JSON text; {"name", "description", "parameters"} alone is wrapped
    as a function.
    """
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    found = without_nulls(list(tools or []))
    return [
        tool if "function" in tool else {"type": "function", "function": tool} for tool in found
    ]


def sft_row(record: dict) -> dict:
    """{"messages", "tools"?}; the tools' schemas may be a list or its JSON text. A system prompt
    that holds them as <tools> needs no second copy from the template."""
    messages = messages_of(record)
    if messages and messages[-1]["role"] != "assistant":
        raise Unfit("the last turn is not the agent's")
    if problem := check_messages(messages):
        raise Unfit(re.sub(r"message \d+: ", "", problem))
    shown = any(m["role"] == "system" and "<tools>" in m["content"] for m in messages)
    tools = [] if shown else schemas_of(record.get("tools"))
    return {"messages": messages, **({"tools": tools} if tools else {})}


# ---------------------------------------------------------------- judgments
def number_in_unit(value) -> float | None:
    """A score in [0, 1] given as a number or as its text, else None."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return None
    return score if 0 <= score <= 1 else None


def judged_parts(record: dict) -> tuple[str, object, str, dict[str, str]]:
    """(question, trajectory, text of the judgment or "", its prompts) of a record: from its own
    fields or from its conversation, which alone has prompts.
    """
    keys = ("judgment", "response", "output", "completion")
    reply = next((record[key] for key in keys if isinstance(record.get(key), str)), "")
    if record.get("question") and record.get("trajectory"):
        return record["question"], record["trajectory"], reply, {}
    messages = messages_of(record, cut=False)
    asked = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
    if messages[-1]["role"] == "assistant":
        reply = messages[-1]["content"]
    # a rubric before the request may name its parts too: alpaca has the request apart from it
    apart = record.get("input")
    start = len(asked) - len(apart) if isinstance(apart, str) and asked.endswith(apart) else 0
    match = JUDGED.search(asked, start) or JUDGED.search(asked)
    if not match:
        raise Unfit("no 'Question: ... Trajectory: ...' in the request")
    form = asked[: match.start(1)] + "{question}" + asked[match.end(1) : match.start(2)]
    prompts = {"system": system_of(messages), "request": form + "{trajectory}"}
    return match[1], match[2], reply, prompts


def system_of(messages: list[dict]) -> str:
    """The system prompt of a conversation, "" where it has none."""
    return next((m["content"] for m in messages if m["role"] == "system"), "")


def rrm_row(record: dict, for_sft: bool) -> dict:
    """{"question", "trajectory", "think", "critique", "score", "correct"?, "answer"?}; RL needs a
    score or correct.
    """
    question, trajectory, reply, _ = judged_parts(record)
    trajectory = parsed(trajectory) if isinstance(trajectory, str) else trajectory
    if isinstance(trajectory, list):
        trajectory = messages_of({"messages": trajectory})
    label = record.get("reward_model") if isinstance(record.get("reward_model"), dict) else {}
    if isinstance(label.get("ground_truth"), str) and "<score>" in label["ground_truth"]:
        reply = reply or label["ground_truth"]
    parts = {
        "think": record.get("think") or record.get("reasoning"),
        "critique": record.get("critique"),
        "score": number_in_unit(record.get("score", label.get("ground_truth"))),
    }
    if judgment := parse_judgment(reply):
        parts = {"think": judgment.think, "critique": judgment.critique, "score": judgment.score}
    row = {
        "question": question,
        "trajectory": trajectory,
        **{k: v for k, v in parts.items() if v not in ("", None)},
    }
    if record.get("correct", record.get("is_correct")) in (True, False):
        row["correct"] = bool(record.get("correct", record.get("is_correct")))
    if not isinstance(question, str) or not isinstance(trajectory, (str, list)):
        raise Unfit("question or trajectory is not text")
    if gold := record.get("answer") or record.get("gold"):
        row["answer"] = gold_answers(gold)
    if "score" not in row and (for_sft or "correct" not in row):
        raise Unfit("the judgment is not the three blocks" if reply else "no score between 0 and 1")
    if for_sft:
        text = (
            f"<think>{row.get('think', '')}</think>"
            f"<critique>{row.get('critique', '')}</critique><score>0.5</score>"
        )
        if parse_judgment(text) is None:
            raise Unfit("no analysis or no critique, or tags inside them")
    return row


def parsed(text: str):
    """A trajectory given as the JSON text of a list of messages, as that list; any other text as it
    is.
    """
    if not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return (
        value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else text
    )


# ---------------------------------------------------------------- tasks
def media_paths(value) -> list[str]:
    """Every text inside `value` (nested dicts and lists) that looks like the path of a file."""
    if isinstance(value, str):
        return [value] if MEDIA.search(value) and "://" not in value else []
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [path for item in items for path in media_paths(item)]


def resolve(path: str, files_dir: Path) -> str:
    """`path` as it is found under files_dir, or the one file there that shares most of its end
    (1.jpg of another set is another image); leaving files_dir is refused."""
    base = files_dir.resolve()
    wanted = (base / path.lstrip("/")).resolve()
    if wanted.is_relative_to(base) and wanted.is_file():
        return str(wanted.relative_to(base))
    namesakes = [
        found
        for found in names_under(base).get(Path(path).name, [])
        if found.resolve().is_relative_to(base)
    ]
    shared = [
        len(os.path.commonprefix([found.parts[::-1], Path(path).parts[::-1]]))
        for found in namesakes
    ]
    best = [found for found, length in zip(namesakes, shared) if length == max(shared)]
    if not best:
        raise Unfit(NO_MEDIA)
    if len(best) > 1 or (
        max(shared) == 1 and len(Path(path).parts) > 1 and len(best[0].relative_to(base).parts) > 1
    ):
        raise Unfit("its media file has only namesakes under files_dir")
    return str(best[0].relative_to(base))


@lru_cache(maxsize=1)
def names_under(folder: Path) -> dict[str, list[Path]]:
    """{name: paths} of every file under `folder`, walked once."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.setdefault(path.name, []).append(path)
    return found


def gold_answers(answer) -> list[str]:
    """Accepted answers as texts: of a text, a number, a list (of lists) of them, or {"target": any
    of these}.
    """
    if isinstance(answer, dict):
        answer = next(
            (answer[key] for key in ("target", "ground_truth", "value") if key in answer), answer
        )
    listed = answer if isinstance(answer, list) else [answer]
    flat = [item for part in listed for item in (part if isinstance(part, list) else [part])]
    if any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in flat):
        raise Unfit("an answer is neither text nor a number")
    return [text for text in dict.fromkeys(str(item).strip() for item in flat) if text]


def media_of(record: dict, files_dir: Path) -> list[str]:
    """The files of a task, relative to files_dir; the fields may be JSON text."""
    given = [record.get(key) for key in ("multimodal_info", "images", "image", "audios", "audio")]
    given = [
        json.loads(value) if isinstance(value, str) and value[:1] in ("{", "[") else value
        for value in given
    ]
    return list(dict.fromkeys(resolve(path, files_dir) for path in media_paths(given)))


def rl_row(record: dict, source: str, number: int, files_dir: Path) -> dict:
    """{"id", "question", "answer", "kind", "meta", "files"?}; `source` is the file's stem, `number`
    its line.
    """
    label = record.get("reward_model") if isinstance(record.get("reward_model"), dict) else {}
    question = record.get("question") or record.get("problem") or record.get("prompt")
    if isinstance(question, list):
        question = next(
            (
                content_text(turn["content"])
                for turn in reversed(question)
                if turn["role"] == "user"
            ),
            "",
        )
    answer = next(
        (
            a
            for a in (record.get("ground_truth"), record.get("answer"), label.get("ground_truth"))
            if a not in (None, "", [])
        ),
        None,
    )
    if not isinstance(question, str) or answer is None:
        raise Unfit("no question or no ground truth")
    info = record.get("meta_info") if isinstance(record.get("meta_info"), dict) else {}
    dataset, category = str(info.get("source") or source), str(record.get("category") or "")
    is_math = re.search(r"math|deepscaler|aime|gsm8k", f"{category} {dataset} {source}", re.I)
    files = media_of(record, files_dir)
    question, marks = re.subn(r"<(image|audio|video)>\s*", "", question)
    if marks and not files:
        raise Unfit("a task with an image or a sound names no file")
    identity = record.get("id")
    row = {
        "id": f"{source}-{number:06d}" if identity in (None, "") else str(identity),
        "question": question.strip(),
        "answer": gold_answers(answer),
        "kind": "math" if is_math else "qa",
        "meta": {"dataset": dataset, **({"category": category} if category else {})},
    }
    if files:
        row["files"] = files
    if problem := check_rl_row(row):
        raise Unfit(problem)
    return row


# ---------------------------------------------------------------- files
def convert(name: str, record, source: str, number: int, files_dir: Path) -> dict:
    """One record of the set `name` as our row; Unfit with the reason where it does not become
    one.
    """
    if not isinstance(record, dict):
        raise Unfit("not an object")
    try:
        if name == "sft":
            return sft_row(record)
        if name == "rl":
            return rl_row(record, source, number, files_dir)
        return rrm_row(record, for_sft=name == "rrm_sft")
    except (
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        json.JSONDecodeError,
    ) as error:
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
    ids restart in files.
    """
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
    names its keys. `prompts` counts what stands in the rows: {"system" | "request": texts}.
    """
    seen: dict[str, int] = {}
    names = Counter(path.name for path in paths)
    for path in paths:
        label = path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
        tally, keys = tallies.setdefault(f"{name}: {label}", Counter()), []
        for number, (_, record) in enumerate(read_records(path), 1):
            tally["read"] += 1
            keys = keys or (
                sorted(map(str, record)) if isinstance(record, dict) else [type(record).__name__]
            )
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
            raise SystemExit(
                f"{path}: none of {tally['read']:,} records fits the set {name!r} (most often: "
                f"{reason}); "
                f"keys found: {', '.join(keys)}. --inspect shows the first ones"
            )


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
            for key, value in (
                record.items() if isinstance(record, dict) else [("(not an object)", record)]
            ):
                text = json.dumps(value, ensure_ascii=False, default=str)
                print(
                    f"   {key} ({type(value).__name__}): {text[:300]}{' ...' * (len(text) > 300)}"
                )


def download(name: str, revision: str) -> dict[Path, str]:
    """The data files of a released set in the hub's local cache, with resume: {file: address with
    the commit}; prints the revision that was read.
    """
    from huggingface_hub import HfApi

    repo = SETS[name][0]
    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except Exception as error:  # the hub's own errors, or those of whichever http library it uses
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"cannot reach {repo} on the hub: {reason}. Fetch it by hand and give --input=FILE"
        ) from error
    files = [
        f.rfilename
        for f in info.siblings
        if f.rfilename.endswith(DATA_FILES) and "/." not in f.rfilename
    ]
    if not files:
        raise SystemExit(
            f"{repo}: no {', '.join(DATA_FILES)} file among its {len(info.siblings)} files"
        )
    print(f"{repo} at {info.sha}: {', '.join(files)}")
    urls = [f"hf://{repo}@{info.sha}/{file}" for file in files]
    return {fetch(url, HERE / "raw"): url for url in urls}


def download_media(files_dir: Path, revision: str) -> None:
    """Everything of the RL set that is not rows (images, audio, archives), into files_dir, with
    resume.
    """
    from huggingface_hub import snapshot_download

    repo, ignored = SETS["rl"][0], [f"*{ending}" for ending in DATA_FILES]
    try:
        snapshot_download(
            repo,
            repo_type="dataset",
            revision=revision,
            local_dir=files_dir,
            ignore_patterns=ignored,
        )
    except Exception as error:  # as in download
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"cannot fetch the media of {repo}: {reason}. Put them under {files_dir} by hand"
        ) from error
    archives = [
        path
        for path in files_dir.rglob("*")
        if path.suffix in (".zip", ".tar", ".gz", ".tgz", ".7z")
    ]
    if archives:
        print(f"unpack these there before the next run: {', '.join(map(str, archives))}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=list(SETS), help="one of the sets (default: all four)")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        help="a local file instead of a download; repeatable",
    )
    parser.add_argument("--out", default=str(HERE), help="folder to write in")
    parser.add_argument(
        "--files_dir",
        default=str(HERE / "files"),
        help="folder that media paths are resolved under",
    )
    parser.add_argument(
        "--revision", default="main", help="commit or branch of the hub's data sets"
    )
    parser.add_argument(
        "--media", action="store_true", help="download the media of the RL set into files_dir first"
    )
    parser.add_argument(
        "--inspect", action="store_true", help="print the first records of each file and stop"
    )
    args = parser.parse_args(argv)
    if args.input and not args.set:
        raise SystemExit(f"--input needs --set, one of {', '.join(SETS)}")
    if args.media:
        download_media(Path(args.files_dir), args.revision)

    tallies: dict = {}
    try:
        for name in [args.set] if args.set else SETS:
            given = {Path(path): "" for path in args.input} or download(name, args.revision)
            if args.inspect:
                inspect(list(given))
                continue
            target, prompts = Path(args.out) / SETS[name][1], {}
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
