"""What test_workers.py gives worker processes to do, in a module of its own because they import it by name."""

import errno
import os
import signal
import time
from pathlib import Path

from tinyllama import InputError
from tinyllama.prepare.encode import Mismatch
from tinyllama.prepare.inputs import Input, NotFetched


def setup(folder: Path):
    """Work that does as the path of its input says, and leaves a file for each process and each input begun."""
    (folder / f"process-{os.getpid()}").touch()
    if (folder / "gone").exists():
        raise InputError("the tokenizer is gone")

    def work(one: Input) -> str:
        with open(folder / "begun", "a") as file:
            file.write(f"{one.name}\n")
            if file.tell() > 100:
                raise OSError("begun again and again")
        match one.path.split():
            case ["die"]:
                os._exit(7)
            case ["die", "once"] if not (folder / "died").exists():
                (folder / "died").touch()
                os._exit(7)
            case ["die", "with", "the", "tokenizer"]:
                (folder / "gone").touch()
                os._exit(7)
            case ["no", "network"]:
                raise NotFetched("no network")
            case ["refuse"]:
                raise InputError("no text")
            case ["differ"]:
                raise Mismatch("other ids")
            case ["full"]:
                raise OSError(errno.ENOSPC, "No space left on device", "the output")
            case ["ctrl-c"]:
                os.kill(os.getpid(), signal.SIGINT)
            case ["meet", count]:
                (folder / f"here-{one.name}").touch()
                end = time.monotonic() + 100
                while len(list(folder.glob("here-*"))) < int(count):
                    if time.monotonic() > end:
                        return "alone"
                    time.sleep(0.01)
        return f"packed {one.name}"

    return work
