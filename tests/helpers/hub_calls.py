"""Runs prepare scripts against the Hub of HF_ENDPOINT, which libraries read once, when they are imported.

Each line of stdin is a JSON list: the script and its arguments. Each answer is a JSON list: exit code, stdout, stderr.
"""

import json
import os
import runpy
import sys
import tempfile

import datasets  # noqa: F401  # each call is a fork of this process
import huggingface_hub.hf_file_system  # noqa: F401
import pyarrow.parquet  # noqa: F401
import sentencepiece  # noqa: F401

from tinyllama import InputError
from tinyllama.prepare import prepare
from tinyllama.prepare.inputs import NotFetched


def over_workers(todo, setup, recipe, workers):
    """Pack the inputs in this process."""
    work = setup(recipe)
    for one in todo:
        try:
            yield one, work(one)
        except (InputError, NotFetched) as error:
            yield one, error


prepare.over_workers = over_workers
for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = json.loads(line)
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                sys.stdout.flush()
                os._exit(end.code or 0)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
        print(json.dumps([code, *said]), flush=True)
