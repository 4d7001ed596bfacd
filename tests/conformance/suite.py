"""PEFT's own tests: fetched, checked, run with LoRA or with LaMDA in its place."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
WORK = ROOT / ".conformance"  # ignored by git

PEFT = "0.21.2"
SHA256 = "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"
ARCHIVE = f"peft-{PEFT}.tar.gz"

MODULES = ("test_custom_models", "test_decoder_models", "test_encoder_decoder_models", "test_seq_classifier")
FORMS = {
    "lora": "PEFT's LoRA",
    "lamda": "LaMDA as it is by default",
    "lamda-paper": "LaMDA in the paper's form, with S0 and B0 in its files",
}

# The paper's form differs in buffers alone, and the custom models ask most of those.
RUNS = (*((form, module) for module in MODULES for form in ("lora", "lamda")), ("lamda-paper", MODULES[0]))

_INI = f"""\
[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
# PEFT's own filters, but for what PEFT's tests set off themselves under this transformers.
filterwarnings =
    error::DeprecationWarning:transformers
    error::FutureWarning:transformers
    ignore:`is_gradient_checkpointing` is deprecated:FutureWarning
    ignore:`gradient_checkpointing_:FutureWarning
pythonpath = peft-{PEFT}
consider_namespace_packages = true
"""


def fetch() -> None:
    """PEFT's tests of the installed version, under `.conformance/`, from the index that pip is set up for.

    Raises:
        SystemExit: Another version is installed, or the archive is not the one that was pinned.
    """
    if version("peft") != PEFT:
        raise SystemExit(
            f"peft {version('peft')} is installed, and the suite is pinned to {PEFT}: see suite.py"
        )
    archive = WORK / ARCHIVE
    if not archive.is_file():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--no-binary", "peft", "--dest", str(WORK)]
        subprocess.run([*pip, f"peft=={PEFT}", *options], check=True)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{archive}: sha256 is {found}, expected {SHA256}; delete it and try again")
    with tarfile.open(archive) as tar:
        tests = [member for member in tar if member.name.startswith(f"peft-{PEFT}/tests/")]
        tar.extractall(WORK, members=tests, filter="data")
    (WORK / "pytest.ini").write_text(_INI)


def run(form: str, module: str, keep: bool = False) -> dict[str, Any]:
    """One module of the suite in one form.

    Args:
        form: A key of `FORMS`.
        module: One of `MODULES`.
        keep: Take what an earlier run has left, if it came to its end.

    Returns:
        What the plugin wrote: `outcomes` (test id -> passed, failed, skipped), `messages` of those that did
        not pass, rows `without` a counterpart, and how many tests were `out_of_scope`.

    Raises:
        SystemExit: The run broke off.
    """
    out = WORK / f"{form}-{module}.json"
    if keep and out.is_file():
        return json.loads(out.read_text())
    out.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # the suite turns "offline" off at times: nobody answers here
        # Not the root: PEFT's `tests` is a package as ours.
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{HERE}",
        "PEFT_CONFORMANCE": form,
        "PEFT_CONFORMANCE_OUT": str(out),
    }
    command = [
        sys.executable, "-m", "pytest", "-c", str(WORK / "pytest.ini"), "--rootdir", str(WORK), "-q",
        "-p", "lamda_retarget", "-p", "no:cacheprovider", "-p", "no:randomly", "--tb=short",
        "--disable-warnings", str(WORK / f"peft-{PEFT}" / "tests" / f"{module}.py"),
    ]  # fmt: skip
    with (WORK / f"{form}-{module}.log").open("w") as log:
        done = subprocess.run(
            command, cwd=WORK / "models", env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode not in (0, 1) or not out.is_file():
        raise SystemExit(f"{module} as {form} broke off (exit code {done.returncode}): see {log.name}")
    return json.loads(out.read_text())
