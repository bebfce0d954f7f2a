"""Find the commit of a branch and the files of a configuration of a dataset on the Hugging Face Hub."""

import contextlib
import re

from tinyllama import InputError, printable
from tinyllama.prepare.listing import filesystem, unreachable

SCHEME = "hf://"
_DATASET = re.compile(r"hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{40})")


def pinned(source: str) -> tuple[str, str | None]:
    """Return ``source`` at the commit that its branch stands for now, and the pinned URL; None for a bucket.

    So all files are of one commit, however long preparation takes.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError

    before, _, url = source.partition(SCHEME)
    fs, path = filesystem(SCHEME + url)
    gated = False
    try:
        where = fs.resolve_path(path)
        if not hasattr(where, "repo_id"):
            return source, None
        commit = where.revision
        if not re.fullmatch("[0-9a-f]{40}", commit):
            commit = HfApi().repo_info(where.repo_id, repo_type=where.repo_type, revision=commit).sha
    except Exception as error:  # of the network or of the address
        raise unreachable(source, error) from None
    with contextlib.suppress(Exception):  # what else is wrong will show when it is listed
        try:
            HfApi().auth_check(where.repo_id, repo_type=where.repo_type)
        except GatedRepoError:
            gated = True
    if gated:
        raise InputError(f"{source}: is gated: accept its terms on its page, and log in with hf auth login")
    dataset = where.root.partition("@")[0]
    origin = f"{SCHEME}{dataset}@{commit}/{where.path_in_repo}".rstrip("/")
    return before + origin, origin


def is_dataset(source: str) -> bool:
    """Return whether ``source``, which is pinned, is a whole dataset and not a folder or a file of it."""
    return bool(_DATASET.fullmatch(source))


def data_files(source: str, config_name: str, split: str | None) -> set[str]:
    """Return the URLs of the files that ``datasets`` reads for a configuration ("": the default one) of a dataset.

    ``split`` is train where there is one, or the only one. Nothing of the dataset is executed.
    """
    import datasets

    match = _DATASET.fullmatch(source)
    assert match
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(match[1], config_name or None, revision=match[2])
    except Exception as error:  # of the network, of the dataset's card, of the configuration's name
        what = printable(" ".join(str(error).partition("Example of usage")[0].split()), 500).rstrip(". ")
        raise InputError(f"{source}: {what}: give a --config_name that it has, or a folder of it as --source") from None
    splits = builder.config.data_files or {}
    chosen = split or ("train" if "train" in splits else next(iter(splits)) if len(splits) == 1 else "")
    if chosen not in splits:
        raise InputError(f"{source}: has the splits {', '.join(sorted(splits))}: give one as --split")
    return set(splits[chosen])
