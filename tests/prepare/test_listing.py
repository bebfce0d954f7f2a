"""Which files at a source are its inputs, and what is said of the others."""

import functools
import os
import socket
import threading
import zipfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec
import pytest

from tinyllama import InputError
from tinyllama.prepare.inputs import ENDINGS, RECORDS, Fields, Inputs, find_inputs
from tinyllama.prepare.prepare import Options, prepare
from tinyllama.prepare.readers import DocumentReader


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def names(inputs: Inputs) -> list[str]:
    return [one.name for one in inputs]


def errors(*arguments, **options) -> tuple[str, ...]:
    with pytest.raises(InputError) as info:
        find_inputs(*arguments, **options)
    return info.value.args


def test_a_link_to_a_parent_adds_nothing(tmp_path):
    source = touch(tmp_path / "corpus", "a.txt", "deep/er/b.txt")
    touch(tmp_path, "other/c.txt")
    (source / "up").symlink_to("..")  # what lies beside the source is not of it
    (source / "deep/er/top").symlink_to(source)
    (source / "deep/er/round").symlink_to(source / "deep")
    found = find_inputs(source, ENDINGS)
    assert names(found) == ["a.txt", "deep/er/b.txt"]
    (note,) = found.notes
    assert note == (
        "read once, where the names in brackets are: "
        f"deep/er/round ({source}/deep), deep/er/top ({source}), up ({tmp_path})"
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_each_real_folder_and_file_once(tmp_path, scheme):
    source, elsewhere = touch(tmp_path / "in", "z/a.txt", "z/b.txt"), touch(tmp_path / "out", "c/d.txt", "c/e/f.txt")
    (source / "a").symlink_to("z")  # the real one keeps its name
    (source / "b.txt").symlink_to("z/b.txt")
    os.link(source / "z/a.txt", source / "z/hard.txt")
    (source / "c").symlink_to(elsewhere / "c")
    (source / "d").symlink_to(elsewhere)
    (elsewhere / "c/e/round").symlink_to(elsewhere / "c")
    found = find_inputs(f"{scheme}{source}", ENDINGS)
    assert names(found) == ["c/d.txt", "c/e/f.txt", "z/a.txt", "z/b.txt"]
    assert [one.path for one in found][0] == f"{scheme}{source}/c/d.txt"
    (note,) = found.notes
    assert note.startswith(
        f"read once, where the names in brackets are: a ({source}/z), b.txt ({source}/z/b.txt), c/e/r"
    )
    assert note.endswith(" and 2 more")


def test_files_that_share_a_number_by_chance_are_two(tmp_path, monkeypatch):
    touch(tmp_path, "a.txt", "b.txt")
    stat = os.stat

    def same(path, *arguments, **options):  # as network file systems do that make numbers up
        found = list(stat(path, *arguments, **options))
        found[1] = 7
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", same)
    assert names(find_inputs(tmp_path, ENDINGS)) == ["a.txt", "b.txt"]


def test_a_folder_that_is_named_twice_is_read_once(tmp_path):
    touch(tmp_path, "go/a.txt", "go/sub/b.txt")
    (tmp_path / "rust").symlink_to("go")
    assert names(find_inputs(tmp_path, ENDINGS, ["go", "rust", "go/sub", "./go/"])) == ["go/a.txt", "go/sub/b.txt"]
    assert names(find_inputs(f"file://{tmp_path}", ENDINGS, ["go", "go/sub"])) == ["go/a.txt", "go/sub/b.txt"]


def test_links_of_a_download_keep_their_names(tmp_path):
    """The Hub's cache has links to blobs that are named by their hash."""
    blob = touch(tmp_path, "blobs/0123") / "blobs/0123"
    source = tmp_path / "snapshots/1"
    source.mkdir(parents=True)
    (source / "a.jsonl").symlink_to(blob)
    assert names(find_inputs(source, ENDINGS)) == ["a.jsonl"]


def test_what_begins_with_a_dot_is_left_out(tmp_path):
    touch(tmp_path, "a.txt", ".b.txt", "._a.txt", ".cache/c.txt", "d/.git/e/f.txt", "d/g.txt")
    found = find_inputs(tmp_path, ENDINGS)
    assert names(found) == ["a.txt", "d/g.txt"]
    assert found.notes == ("not read: 4 that begin with a dot",)
    fs = fsspec.filesystem("memory")
    for name in ("a.txt", ".b.txt", ".cache/c.txt"):
        fs.pipe(f"/dots/{name}", b"x")
    found = find_inputs("memory://dots", ENDINGS)
    assert (names(found), found.notes) == (["a.txt"], ("not read: 2 that begin with a dot",))
    fs.rm("/dots", recursive=True)
    # but for the source itself
    assert names(find_inputs(tmp_path / ".cache", ENDINGS)) == ["c.txt"]
    assert names(find_inputs(tmp_path / ".b.txt", ENDINGS)) == [".b.txt"]


def test_what_is_left_out_is_counted_by_its_ending(tmp_path):
    touch(
        tmp_path, "a.TXT", "b.Jsonl.GZ", "x.md", "y.MD", "z.tar.gz", "Makefile", "v1.5.bin", "odd.a name of a sentence"
    )
    found = find_inputs(tmp_path, ENDINGS)
    assert names(found) == ["a.TXT", "b.Jsonl.GZ"]
    assert found.notes == ("not read: 2 .md, 2 without an ending, 1 .bin, 1 .tar.gz",)


def test_caches_and_notes_of_datasets_are_left_out(tmp_path):
    touch(
        tmp_path,
        "saved/state.json",
        "saved/dataset_info.json",
        "saved/data-00000-of-00001.arrow",
        "saved/cache-1.arrow",
    )
    touch(tmp_path, "cached/dataset_info.json", "cached/cache-2.arrow", "cached/x-train.arrow", "own/cache-3.arrow")
    found = find_inputs(tmp_path, ENDINGS)
    assert names(found) == ["cached/x-train.arrow", "own/cache-3.arrow", "saved/data-00000-of-00001.arrow"]
    assert found.notes == ("not read: 5 that datasets keeps beside its data",)


def test_texts_that_are_about_the_corpus_are_named(tmp_path):
    about = ["LICENSE.txt", "sub/README.txt", "SHA256SUMS.txt", "robots.txt", "licence-de.txt", "checksum.md5.txt"]
    corpus = ["book.txt", "licensed.txt", "readme.jsonl", "read me.txt"]
    found = find_inputs(touch(tmp_path, *about, *corpus), ENDINGS)
    assert names(found) == sorted(about + corpus, key=lambda name: name.replace("/", "--"))
    listed = ", ".join(name for name in names(found) if name in about)
    assert found.notes == (f"read as text; remove what is not part of the corpus: {listed}",)
    assert find_inputs(tmp_path / "README.txt".replace("README", "LICENSE"), ENDINGS).notes == ()  # named by the user


def test_files_that_differ_in_their_ending_alone_are_named(tmp_path):
    twice = ["a.jsonl", "a.jsonl.gz", "b/c.d.JSONL.zst", "b/c.d.parquet"]
    found = find_inputs(touch(tmp_path, *twice, "b/a.jsonl", "a.b.jsonl", "A.jsonl"), ENDINGS)
    assert set(twice) < set(names(found))
    assert found.notes == (
        "perhaps one text twice; keep one of each: a.jsonl and a.jsonl.gz, b/c.d.JSONL.zst and b/c.d.parquet",
    )
    assert find_inputs(tmp_path / "b/c.d.parquet", ENDINGS).notes == ()


def test_pipes_and_sockets_are_errors_and_do_not_block(tmp_path):
    os.mkfifo(touch(tmp_path, "a.txt") / "b.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "c.txt"))
        pipe, plug = errors(tmp_path, ENDINGS)
    assert errors(tmp_path / "b.jsonl", ENDINGS) == (
        f"{tmp_path}/b.jsonl: is a pipe, a socket or a device: give a file or a folder",
    )
    assert pipe == f"{tmp_path}/b.jsonl: is a pipe, a socket or a device: put a file in its place or remove it"
    assert plug.startswith(f"{tmp_path}/c.txt: is a pipe")
    assert names(find_inputs(tmp_path, (".md", ".parquet", ".xyz") + ("a.txt",))) == ["a.txt"]  # others do not matter


def test_a_link_to_itself_is_an_error_where_it_would_be_read(tmp_path):
    (touch(tmp_path, "a.txt") / "b.txt").symlink_to("b.txt")
    (tmp_path / "c").symlink_to("c")
    assert errors(tmp_path, ENDINGS) == (
        f"{tmp_path}/b.txt: cannot be opened (a link to nothing, or no permission): repair or remove it",
    )


def test_a_split_is_a_folder_or_a_word_of_files_names(tmp_path):
    touch(tmp_path, "a/train/x.txt", "a/test/y.txt")
    assert names(find_inputs(tmp_path / "a", ENDINGS, split="train")) == ["x.txt"]
    touch(
        tmp_path,
        "b/data/train-00000-of-00002.parquet",
        "b/data/test-0.parquet",
        "b/training.parquet",
        "b/c4-train.1.json.gz",
    )
    touch(tmp_path, "b/x/train/1.parquet", "b/constrain.parquet")
    found = find_inputs(tmp_path / "b", RECORDS, split="train")
    assert names(found) == ["c4-train.1.json.gz", "data/train-00000-of-00002.parquet", "x/train/1.parquet"]
    assert found.notes == ("not read: 3 of other splits",)
    (message,) = errors(tmp_path / "b", RECORDS, split="validation")
    assert "in a folder validation or with validation in its name" in message
    assert f"{tmp_path}/b: no file ending in .jsonl or .ndjson or .json or .parquet or .arrow (compressed" in message


def test_saved_splits_are_not_mixed(tmp_path):
    import datasets

    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert errors(tmp_path / "saved", ENDINGS) == (
        f"{tmp_path}/saved: it has the splits test, train: give one as --split",
    )
    assert "saved/ has the splits test, train" in errors(tmp_path, ENDINGS)[0]
    for name in splits:
        (one,) = find_inputs(tmp_path / "saved", ENDINGS, split=name)
        assert list(DocumentReader(Path(one.path), Fields())) == [name]
    assert names(find_inputs(tmp_path, ENDINGS, split="test")) == ["saved/test/data-00000-of-00001.arrow"]
    datasets.DatasetDict({"all": splits["train"]}).save_to_disk(tmp_path / "one")
    assert names(find_inputs(tmp_path / "one", ENDINGS)) == ["all/data-00000-of-00001.arrow"]


@pytest.fixture
def archive(tmp_path) -> str:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("x.jsonl", "deep/y.jsonl", "deep/.z.jsonl", "notes.md"):
            file.writestr(name, f'{{"text": "{name}"}}\n')
    return str(tmp_path / "a.zip")


def texts(inputs: Inputs) -> list[str]:
    found = []
    for one in inputs:
        with one.fetched() as path:
            found += DocumentReader(path, Fields())
    return found


@pytest.mark.parametrize("before", ["", "file://"])
def test_an_archive_is_read_where_it_is(archive, before):
    found = find_inputs(f"zip://::{before}{archive}", ENDINGS)
    assert names(found) == ["deep/y.jsonl", "x.jsonl"]
    assert texts(found) == ["deep/y.jsonl", "x.jsonl"]
    assert found.notes == ("not read: 1 .md, 1 that begin with a dot",)
    assert names(find_inputs(f"zip://*.jsonl::{before}{archive}", ENDINGS)) == ["x.jsonl"]
    assert names(find_inputs(f"zip://deep/*.jsonl::simplecache::{before}{archive}", ENDINGS)) == ["y.jsonl"]
    assert texts(find_inputs(f"zip://x.jsonl::{before}{archive}", ENDINGS)) == ["x.jsonl"]
    assert names(find_inputs(f"zip://::{before}{archive}", ENDINGS, ["deep"])) == ["deep/y.jsonl"]


def _changed(archive: str, place: int, value: int) -> None:
    """Change a byte of both headers of the first file in an archive."""
    content = bytearray(Path(archive).read_bytes())
    for header, offset in ((b"PK\3\4", 0), (b"PK\1\2", 2)):
        content[content.index(header) + offset + place] = value
    Path(archive).write_bytes(content)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (6, 1, "File 'x.jsonl' is encrypted, password required for extraction"),
        (8, 99, "That compression method is not supported"),
        (14, 0, "Bad CRC-32 for file 'x.jsonl'"),
    ],
)
def test_a_damaged_or_encrypted_archive_is_the_inputs_error(archive, place, value, said):
    _changed(archive, place, value)
    (one,) = find_inputs(f"zip://*.jsonl::{archive}", ENDINGS)
    with pytest.raises(InputError) as error:
        one.fetched().__enter__()
    hint = "it is damaged or encrypted: download it again, or unpack it and give the files"
    assert str(error.value) == f"zip://x.jsonl::{archive}: cannot be fetched ({said}): {hint}"


def test_patterns_and_caches_of_urls(tmp_path):
    touch(tmp_path, "a.jsonl", "b.txt")
    fs = fsspec.filesystem("memory")
    for name in ("en/a.jsonl", "en/b.txt", "de/c.jsonl"):
        fs.pipe(f"/many/{name}", b'{"text": "x"}\n')
    assert names(find_inputs("memory://many/en/*.jsonl", ENDINGS)) == ["a.jsonl"]
    assert names(find_inputs("memory://many/*/*.jsonl", ENDINGS)) == ["de/c.jsonl", "en/a.jsonl"]
    assert texts(find_inputs("simplecache::memory://many/de", ENDINGS)) == ["x"]
    fs.rm("/many", recursive=True)


def test_one_file_over_http(tmp_path):
    touch(tmp_path, "notes.txt")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with (
        mock.patch.object(SimpleHTTPRequestHandler, "log_message"),
        ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
    ):
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        for source in (f"{url}/a.jsonl", f"{url}/a.jsonl?download=true", f"simplecache::{url}/a.jsonl"):
            found = find_inputs(source, ENDINGS)
            assert (names(found), texts(found)) == (["a.jsonl"], ["one"])
        assert "ends in none of" in errors(f"{url}/", ENDINGS)[0]  # an index
        assert errors(f"{url}/none.jsonl", ENDINGS)[0].startswith(f"{url}/none.jsonl: cannot be listed (404, message=")
        server.shutdown()
        thread.join()
    (message,) = errors(f"{url}/a.jsonl", ENDINGS)
    assert message.startswith(f"{url}/a.jsonl: cannot be listed (Cannot connect to host")


def test_sources_that_are_nothing_are_one_line(tmp_path, archive):
    for source in (
        f"zip://::{tmp_path}/none.zip",
        f"zip://::{tmp_path}",
        "nosuch://x",
        "nosuch::memory://x",
        "zip://::",
    ):
        (message,) = errors(source, ENDINGS)
        assert message.startswith(source), message
        assert "\n" not in message
    assert "no file ending in" in errors(f"zip://none::{archive}", ENDINGS)[0]
    assert "hf://datasets/OWNER/NAME" in errors("owner/name", ENDINGS)[0]


def test_the_summary_says_what_was_not_read(tmp_path, tokenizer_file, one_process):
    touch(tmp_path, "in/a.txt", "in/b.md", "in/README.txt")
    (tmp_path / "in/empty.txt").touch()
    (tmp_path / "in/none.jsonl").write_text("\n\n")
    summary = prepare(
        find_inputs(tmp_path / "in", ENDINGS),
        Fields(),
        Options(tokenizer_file, tmp_path / "out", encoder="sentencepiece"),
    )
    lines = summary.splitlines()
    assert lines[-4:-1] == [
        "not read: 1 .md",
        "read as text; remove what is not part of the corpus: README.txt",
        "files without a document: 2 (empty.txt, none.jsonl)",
    ]
    assert "4 shards (4 new), 2 documents" in lines[-1]


def test_an_output_below_the_source_is_no_input(tmp_path, tokenizer_file, one_process):
    touch(tmp_path, "a.txt", "b.jsonl.json", "c/manifest.json")
    (tmp_path / "b.jsonl.json").write_text('{"text": "a document"}')
    (tmp_path / "c/manifest.json").write_text('{"text": "another"}')
    for _ in range(2):
        found = find_inputs(tmp_path, ENDINGS)
        assert names(found) == ["a.txt", "b.jsonl.json", "c/manifest.json"]
        prepare(found, Fields(), Options(tokenizer_file, tmp_path / "packed"))
    assert "4 of packed folders" in found.notes[0]


def test_a_path_too_long_for_a_shards_name(tmp_path, tokenizer_file, one_process):
    folder = "d" * 120
    touch(tmp_path / "in", f"{folder}/{'e' * 109}.txt")  # with -- between them 235 bytes
    (message,) = errors(tmp_path / "in", ENDINGS)
    said = (
        "would become a shard with a name of 235 bytes: give a --source nearer to it, or shorten its path to 234 bytes"
    )
    assert message.endswith(f".txt: {said}")
    for source in (tmp_path / "in" / folder, touch(tmp_path / "fits", f"{folder}/{'é' * 54}.txt")):
        prepare(find_inputs(source, ENDINGS), Fields(), Options(tokenizer_file, tmp_path / "out" / source.name))
