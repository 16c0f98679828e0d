"""`spotlighter run -- train.py …`: a script of Dassl's with Spotlighter's trainers at hand, and no file changed.

What `attach` writes into a fork happens in this process instead: the fixes of today.py before Dassl is imported, the
options of TRAINER.SPOTLIGHTER in every configuration that Dassl makes, and, for every trainer X that the script
registers, a trainer XSpotlighter that is made when it is asked for.
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
from .attach import SUFFIX, known_as

NO_CHECK = "SPOTLIGHTER_NO_CHECK"  # trainer.py has it, too, and imports torch


def run_fork(argv: list[str]) -> None:
    """Run a script, argv[0], with the arguments that follow it, as `python` would.

    Raises:
        FileNotFoundError: there is no such script.
    """
    script = Path(argv[0])
    if not script.is_file():
        raise FileNotFoundError(f"{script}: no such file; run this in the fork's folder, as python {script} …")
    sys.argv = argv
    sys.path.insert(0, str(script.parent.resolve()))  # the fork's own clip, datasets and trainers come first
    from . import today  # noqa: F401

    _add_options()
    offer_trainers(makes=not any(script.parent.glob("*/*_spotlighter.py")))  # where one is attached, its file does
    runpy.run_path(str(script), run_name="__main__")


def _add_options():
    """Let dassl.config.get_cfg_default, which train.py imports, give TRAINER.SPOTLIGHTER, too."""
    from dassl import config as dassl_config

    from ..config import extend_cfg

    original, clean = dassl_config.get_cfg_default, getattr(dassl_config, "clean_cfg", None)

    def get_cfg_default():
        cfg = original()
        extend_cfg(cfg)
        return cfg

    def clean_cfg(cfg, trainer):  # throws away what is not this trainer's
        clean(cfg, trainer)
        extend_cfg(cfg)

    dassl_config.get_cfg_default, dassl_config.clean_cfg = get_cfg_default, clean_cfg


def offer_trainers(makes: bool = True) -> None:
    """Let Dassl's registry have XSpotlighter for every trainer X, made when it is asked for.

    Where the script is asked for a generic XSpotlighter, it is told X, which its own code may look at, and given ours.

    Args:
        makes: whether trainers are made; if not, files of the fork register them.
    """
    from dassl.engine import TRAINER_REGISTRY as registry

    get, names, stands_in = registry.get, registry.registered_names, _told_the_host(sys.argv)

    def offered():
        own = list(names())
        made = [f"{known_as(name) or name}{SUFFIX}" for name in own if not name.endswith(SUFFIX)]
        return list(dict.fromkeys([*own, *made]))

    def made(name):
        name = f"{name}{SUFFIX}" if name == stands_in and (makes or f"{name}{SUFFIX}" in names()) else name
        hosts = [each for each in names() if name in (f"{each}{SUFFIX}", f"{known_as(each)}{SUFFIX}")]
        if makes and hosts and name not in names():
            _make(name, hosts[0], get(hosts[0]))
        return get(name)

    registry.get, registry.registered_names = made, offered


def _told_the_host(argv: list[str]) -> str | None:
    """Replace --trainer XSpotlighter by X, if X has no adapter of its own here; X, or None."""
    for i, (flag, name) in enumerate(zip(argv, argv[1:], strict=False)):
        host = name.removesuffix(SUFFIX)
        if flag == "--trainer" and host != name and known_as(host) is None:
            argv[i + 1] = host
            return host
    return None


def _make(name, host, trainer):
    """Register our trainer of a host, from its file or generic."""
    if known_as(host) is None:
        from dassl.engine import TRAINER_REGISTRY as registry

        from ..trainer import SpotlighterAttachedMixin

        registry.register(type(name, (SpotlighterAttachedMixin, trainer), {}))
        return
    module = f"trainers.{known_as(host).lower()}_spotlighter"
    if importlib.util.find_spec(module):
        importlib.import_module(module)
        return
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: install Spotlighter with pip install -e REPOSITORY")
    spec = importlib.util.spec_from_file_location(module, path)
    sys.modules[module] = ours = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ours)


app = typer.Typer(add_completion=False)


@app.command(context_settings={"ignore_unknown_options": True})
def command(
    arguments: Annotated[list[str], typer.Argument(metavar="-- train.py …", help="the fork's script and its flags")],
    no_check: Annotated[
        bool, typer.Option("--no-check", help="attach without the check that it changes nothing")
    ] = False,
) -> None:
    """Run a fork's train.py with Spotlighter's trainers at hand, without a change to the fork."""
    # in an interpreter of its own: this one may hold another `clip` than the fork's
    env = {**os.environ, NO_CHECK: "1"} if no_check else None
    raise typer.Exit(subprocess.call([sys.executable, "-m", __name__, *arguments], env=env))


if __name__ == "__main__":
    try:
        run_fork(sys.argv[1:])
    except Exception as error:
        line = one_line(error)
        if line is None or os.environ.get("SPOTLIGHTER_DEBUG"):
            raise
        sys.exit(f"error: {line}")
