"""`spotlighter run -- train.py …`: a fork's own train.py, with Spotlighter's trainer registered, and no file changed.

What `attach` writes into the fork happens in this process instead: the fixes of today.py before Dassl is imported, the
options of TRAINER.SPOTLIGHTER in every configuration that Dassl makes, our trainer after the host's.
"""

import importlib
import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..compat import ROOT
from ..errors import one_line
from .attach import Host, recognise


def run_fork(argv: list[str]) -> None:
    """Run a fork's script, argv[0], with the arguments that follow it, as `python` would.

    Raises:
        FileNotFoundError, ValueError: there is no such script, or its folder is no fork.
    """
    script = Path(argv[0])
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such file; run this in the fork's folder, as python {script} …")
    host, module = recognise(script.parent)
    sys.argv = argv
    sys.path.insert(0, str(script.parent.resolve()))  # the fork's own clip, datasets and trainers come first
    from . import today  # noqa: F401

    _add_options()
    importlib.import_module(module)  # registers the host
    _import_trainer(host)
    runpy.run_path(str(script), run_name="__main__")


def _add_options():
    """Let dassl.config.get_cfg_default, which train.py imports, give TRAINER.SPOTLIGHTER, too."""
    from dassl import config as dassl_config

    from ..config import extend_cfg

    original = dassl_config.get_cfg_default

    def get_cfg_default():
        cfg = original()
        extend_cfg(cfg)
        return cfg

    dassl_config.get_cfg_default = get_cfg_default


def _import_trainer(host: Host):
    """Our file of the host's trainer, under the name that it would have in the fork, unless it is there already."""
    name = f"trainers.{host.module}"
    if importlib.util.find_spec(name):
        importlib.import_module(name)
        return
    host.read(host.files[0])  # says so where it is missing
    spec = importlib.util.spec_from_file_location(name, ROOT / host.files[0])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


app = typer.Typer(add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def command(
    arguments: Annotated[list[str], typer.Argument(metavar="-- train.py …", help="the fork's script and its flags")],
):
    """Run a fork's train.py with Spotlighter's trainer at hand, without a change to the fork."""
    # in an interpreter of its own: this one may hold another `clip` than the fork's
    raise typer.Exit(subprocess.call([sys.executable, "-m", __name__, *arguments]))


if __name__ == "__main__":
    try:
        run_fork(sys.argv[1:])
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        sys.exit(f"error: {line}")
