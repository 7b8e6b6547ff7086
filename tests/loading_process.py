"""A process that has imported what loads an export and forks for each one: as fresh as a new one, without its start.

It runs under `python -I` as `autopeft.export.verify` asks, never imports autopeft, reads a JSON object a line (`argv`,
`cwd`, `stderr`) and answers with the exit code. `tests/conftest.py` starts it; `export/test_verify.py` goes without.
"""

import importlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import safetensors.numpy
import safetensors.torch  # noqa: F401 (imported for the forks)
import timm  # noqa: F401
import torch

torch.set_num_threads(1)


def child(job):
    """Run the script as `python -I` would, and leave."""
    log = os.open(job["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    sys.argv = job["argv"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:  # noqa: BLE001 (whatever it is, the parent is told)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


for line in sys.stdin:
    job = json.loads(line)
    text = Path(job["argv"][1]).read_text(encoding="utf-8")
    for name in ("peft", "diffusers", "transformers"):
        if f"import {name}" in text or f"from {name}" in text:
            importlib.import_module(name)
    assert not any(name.partition(".")[0] == "autopeft" for name in sys.modules)
    pid = os.fork()
    if pid == 0:
        child(job)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
