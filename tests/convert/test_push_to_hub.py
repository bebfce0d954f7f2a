"""--push_to_hub against a Hub on loopback."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hub_stub import serve
from huggingface_hub import constants

Push = Callable[..., tuple[int, str, str]]


@pytest.fixture
def push(script, step_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Push:
    """A function that converts and uploads to the Hub at an address, with a token or none."""

    def push(url: str, repo: str, token: str | None = "hf_good") -> tuple[int, str, str]:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", token or "")
        flags = ("--no-verify", "--license", "mit", "--push_to_hub", repo)
        return script("convert_lit_checkpoint", step_dir, tmp_path / "hf", *flags)

    return push


def test_a_folder_is_uploaded_whole(push: Push, step_dir: Path, tmp_path: Path) -> None:
    with serve() as hub:
        for _ in range(2):  # again, to a repository that there is
            code, out, err = push(hub.url, "owner/mine")
            assert (code, err) == (0, "")
        assert out == f"{step_dir} -> {tmp_path / 'hf'}\n{tmp_path / 'hf'} -> {hub.url}/owner/mine/commit/1\n"
        assert hub.models["owner/mine"] == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    card = hub.models["owner/mine"]["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert 'from_pretrained("owner/mine")' in card


def test_the_card_of_a_folder_that_stays_here_names_that_folder(script, step_dir: Path, tmp_path: Path) -> None:
    """Its name on this disk is not its name where it is copied to."""
    assert script("convert_lit_checkpoint", step_dir, tmp_path / "hf", "--no-verify")[0] == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`.` is the folder of this file" in card
    assert card.count('from_pretrained(".') == 2
    assert "hf" not in card.partition("## How to use it")[2].replace("convert_hf_to_gguf", "")


@pytest.mark.parametrize(
    ("repo", "token", "problem"),
    [
        ("owner/mine", None, "--push_to_hub needs a token of the Hub that may write: hf auth login, or set HF_TOKEN"),
        ("owner/mine", "hf_bad", "the token is not valid: hf auth login, or set HF_TOKEN"),
        ("mine", "hf_good", "--push_to_hub mine is not a repository: give OWNER/NAME"),
        ("owner/mi ne", "hf_good", "--push_to_hub owner/mi ne is not a repository: give OWNER/NAME"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(repo, token, problem, push, tmp_path) -> None:
    with serve() as hub:
        code, out, err = push(hub.url, repo, token)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: --push_to_hub")
    assert err.endswith(f"{problem}\n")
    assert not (tmp_path / "hf").exists()


def test_a_hub_that_is_not_there_is_an_error(push: Push, tmp_path: Path) -> None:
    code, out, err = push("http://127.0.0.1:9", "owner/mine")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: --push_to_hub: the Hub cannot be reached (")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("repo", "refuses", "problem"),
    [
        ("nobody/mine", "", "the Hub answers 403 (You may not create a model under this namespace): "),
        ("owner/mine", "preupload", "the Hub answers 400 (out of order): try again later"),
    ],
)
def test_nothing_is_lost_when_an_upload_fails(
    repo, refuses, problem, push: Push, step_dir: Path, tmp_path: Path
) -> None:
    with serve() as hub:
        hub.refuses = refuses
        code, out, err = push(hub.url, repo)
        assert (code, out, err.count("\n")) == (2, f"{step_dir} -> {tmp_path / 'hf'}\n", 1), err
        assert err.startswith(f"error: {repo}: {problem}")
        assert "is complete: upload it with the same command, or with hf upload" in err
        assert (tmp_path / "hf/model.safetensors").exists()
