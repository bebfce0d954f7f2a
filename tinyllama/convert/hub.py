"""Upload an exported folder to the Hugging Face Hub."""

from pathlib import Path

from tinyllama import InputError, printable


def check(repo: str) -> None:
    """Raise InputError unless ``repo`` is OWNER/NAME and the Hub knows whose token is here, before anything is done."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        is_valid = repo.count("/") == 1
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise InputError(f"--push_to_hub {printable(repo, 100)} is not a repository: give OWNER/NAME")
    if get_token() is None:
        raise InputError("--push_to_hub needs a token of the Hub that may write: hf auth login, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except Exception as error:  # of the network or the token
        raise InputError(f"--push_to_hub: {_reason(error)}") from None


def push(folder: Path, repo: str) -> str:
    """Upload ``folder`` to the model repository ``repo``, and return the address of the commit.

    It is created if there is none. Raises InputError when the Hub refuses or is not there; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars, logging

    disable_progress_bars()
    logging.set_verbosity_error()  # it warns of every retry
    try:
        HfApi().create_repo(repo, exist_ok=True)
        return str(
            HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by TinyLlama").commit_url
        )
    except Exception as error:  # of the network, of the token's rights
        hint = f"{folder} is complete: upload it with the same command, or with hf upload"
        raise InputError(f"{repo}: {_reason(error)}; {hint}") from None


def _reason(error: Exception) -> str:
    """Say in a line what the Hub answered, or why it did not."""
    response = getattr(error, "response", None)
    if response is None:
        return f"the Hub cannot be reached ({printable(error, 200) or type(error).__name__}): check the network"
    said = printable(getattr(error, "server_message", None) or str(error).strip().splitlines()[-1], 300)
    hints = {
        401: "the token is not valid: hf auth login, or set HF_TOKEN",
        403: "the token may not write there: give one with write access, or a namespace of yours",
        404: "there is no such namespace, or the token may not see it: give OWNER/NAME of an account of yours",
    }
    return f"the Hub answers {response.status_code} ({said}): {hints.get(response.status_code, 'try again later')}"
