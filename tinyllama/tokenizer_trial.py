"""A tokenizer.json is tried in a process of its own where its library might abort, hang or fill the memory.

Most files need no trial: what they are made of is known to be harmless, whatever text they meet. A regular expression,
a character map or a long sequence of steps is tried: once for each file and process, in about 0.2 s.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

SECONDS = 20  # of processor time for a trial, and one more for each megabyte of the file
MEMORY = 2 << 30  # bytes of address space, and a hundred more for each of the file
# texts that make regular expressions backtrack, and what every language has
TEXTS = (
    "",
    *("x" * 3000, "x" * 3000 + "!", " " * 3000 + "x", "ab" * 1000 + "0", "0" * 1000 + "x", "\n \t" * 700, "=" * 999),
    " ".join(map(chr, range(0x21, 0x7F))),
    "It's the first of 1,024 tests:\r\n\tdon't split naïve words or 3.14159 wrongly…  </s> <0x0A>",
    "e\u0301 is not \u00e9, \u212b \ufb01 \u00a0 \u3000 \u200b 漢字かな ١٢٣ \U0001f642 \U0010ffff",
)
# reads what the library is to load from stdin; says on stdout what went wrong
_CHILD = """
import contextlib, json, resource, sys
seconds, memory, texts = json.loads(sys.argv[1])
for limit, value in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(OSError, ValueError):  # of a system that has no such limit
        resource.setrlimit(limit, (value, hard))
import tokenizers
try:
    tokenizer = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
    for text in texts:
        tokenizer.decode(tokenizer.encode(text).ids)
    for number in range(min(tokenizer.get_vocab_size(), 10_000)):
        tokenizer.decode([number])
except BaseException as error:
    sys.stdout.buffer.write((str(error) or type(error).__name__).encode(errors="replace"))
"""
# kinds of steps that take time in proportion to the text and cannot panic; see _is_short, too
_HARMLESS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Prepend", "Replace"}
_HARMLESS |= {"ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits", "Punctuation"}
_HARMLESS |= {"ByteFallback", "Fuse", "Strip", "WordPiece", "BPEDecoder"}
_tried: dict[str, str] = {}


def is_failure(error: BaseException) -> bool:
    """Return whether a library failed: a panic of one written in Rust is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def error_of(content: dict[str, Any], sha256: str) -> str:
    """Return why the library cannot work with this tokenizer.json, ``""`` where it can as far as is known."""
    if _is_harmless(content):
        return ""
    if sha256 not in _tried:
        _tried[sha256] = _try(json.dumps(content).encode())
    return _tried[sha256]


def _try(payload: bytes) -> str:
    seconds = SECONDS + len(payload) // 2**20
    memory = MEMORY + 100 * len(payload)
    limits = json.dumps([seconds, memory, TEXTS])
    command = [sys.executable, "-P", "-c", _CHILD, limits]
    env = os.environ | {"RUST_BACKTRACE": "0"}
    try:
        done = subprocess.run(command, input=payload, capture_output=True, timeout=30 * seconds, env=env)
    except subprocess.TimeoutExpired:
        return f"short texts take it more than {30 * seconds} s"
    if done.returncode == 0:
        return done.stdout.decode(errors="replace")
    said = done.stderr.decode(errors="replace").strip()
    if -done.returncode in (signal.SIGKILL, signal.SIGXCPU) or "memory allocation" in said:
        return f"short texts take it more than {seconds} s or {memory >> 30} GB"
    return f"it ends its process (exit code {done.returncode}): {said[-150:]}"


def _is_harmless(content: dict[str, Any]) -> bool:
    model = content.get("model")
    if not isinstance(model, dict) or model.get("end_of_word_suffix"):
        return False
    if model.get("continuing_subword_prefix") not in (None, "", *["##"] * (model.get("type") == "WordPiece")):
        return False
    if "merges" in model and not _are_merges(model["merges"], model.get("vocab")):
        return False
    for key in ("normalizer", "pre_tokenizer", "decoder"):
        found = list(steps(content.get(key)))
        kinds = [str(step.get("type")) for step in found if step.get("type") != "Sequence"]
        # each kind once: a step repeated a hundred times may let the text grow without bounds
        if len(set(kinds)) < len(kinds) or not _HARMLESS.issuperset(kinds) or not all(map(_is_short, found)):
            return False
    return True


def _are_merges(merges: Any, vocab: Any) -> bool:
    """Return whether each of the merges has two halves, and these and the whole are in the vocabulary."""
    if not isinstance(merges, list) or not isinstance(vocab, dict):
        return False
    for merge in merges:
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(halves, list) and len(halves) == 2 and all(isinstance(half, str) for half in halves)):
            return False
        if not (halves[0] in vocab and halves[1] in vocab and halves[0] + halves[1] in vocab):
            return False
    return True


def steps(step: Any) -> Iterator[dict[str, Any]]:
    """Yield a step and those within it; what is no step at all is one without a type."""
    if step is None:
        return
    if not isinstance(step, dict):
        yield {}
        return
    yield step
    if step.get("type") == "Sequence":
        within = next((step[key] for key in ("normalizers", "pretokenizers", "decoders") if key in step), None)
        for one in within if isinstance(within, list) else [0]:
            yield from steps(one)


def _is_short(step: dict[str, Any]) -> bool:
    """Return whether a step's texts are single characters and its numbers 0 or 1."""
    pattern = step.get("pattern", {"String": " "})
    if not isinstance(pattern, dict) or set(pattern) != {"String"}:
        return False
    texts = [pattern["String"], *(step.get(key, "▁") for key in ("content", "prepend", "replacement"))]
    numbers = [step.get(key, 0) for key in ("start", "stop")]
    return all(isinstance(one, str) and len(one) == 1 for one in texts) and all(one in (0, 1) for one in numbers)
