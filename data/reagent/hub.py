"""The released sets on the Hugging Face hub: their data files, and the media of the RL set."""

from pathlib import Path

from data.hotpotqa.prepare import fetch

DATA_FILES = (".json", ".jsonl", ".parquet")


def download(repo: str, revision: str, raw: Path) -> dict[Path, str]:
    """The data files of a released set under `raw`, with resume: {file: address with the commit};
    prints the revision that was read."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except Exception as error:  # the hub's own errors, or those of whichever http library it uses
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"cannot reach {repo} on the hub: {reason}. Fetch it by hand and give --input=FILE"
        ) from error
    names = [sibling.rfilename for sibling in info.siblings]
    files = [name for name in names if name.endswith(DATA_FILES) and "/." not in name]
    if not files:
        raise SystemExit(f"{repo}: no {', '.join(DATA_FILES)} file among its {len(names)} files")
    print(f"{repo} at {info.sha}: {', '.join(files)}")
    urls = [f"hf://{repo}@{info.sha}/{file}" for file in files]
    return {fetch(url, raw): url for url in urls}


def download_media(repo: str, revision: str, files_dir: Path) -> None:
    """Everything of a set that is not rows (images, audio, archives), into files_dir, with
    resume."""
    from huggingface_hub import snapshot_download

    given = dict(repo_type="dataset", revision=revision, local_dir=files_dir)
    given["ignore_patterns"] = [f"*{ending}" for ending in DATA_FILES]
    try:
        snapshot_download(repo, **given)
    except Exception as error:  # as in download
        reason = str(error).strip().splitlines()[0]
        raise SystemExit(
            f"cannot fetch the media of {repo}: {reason}. Put them under {files_dir} by hand"
        ) from error
    packed = (".zip", ".tar", ".gz", ".tgz", ".7z")
    if archives := [str(path) for path in files_dir.rglob("*") if path.suffix in packed]:
        print(f"unpack these there before the next run: {', '.join(archives)}")
