"""Which runs of train.py a protocol is made of.

A protocol is planned as chains of runs. Chains are independent; in a chain, each run may need the first one's model.
Folders are those of CoOp's scripts, so both sides' tools read them.
"""

from dataclasses import dataclass
from pathlib import Path

from ...compat import ROOT as HERE
from ..training.runs import config_files, read_run, same, unsaved

ELEVEN = ["imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"]
ELEVEN += ["sun397", "dtd", "eurosat", "ucf101"]
VARIANTS = ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"]
ICONS = ["icon_scenes", "icon_scenes_inverted", "icon_scenes_colour", "icon_scenes_pixel", "icon_scenes_dark"]
GROUPS = {"eleven": ELEVEN, "variants": VARIANTS, "icons": ICONS}
SOURCE = {"crossdomain": ("imagenet", VARIANTS), "crossdataset": ("imagenet", ELEVEN[1:])}
PROTOCOLS = ("base2new", "fewshot", "crossdomain", "crossdataset")
ZERO_SHOT = "ZeroshotCLIP"


def train_py(home: Path) -> list[str]:
    """What follows `python` to run a home's train.py; an installed package has a module in its place."""
    module = ["-m", "spotlighter_plugin.workbench.training.train"]
    return ["train.py"] if Path(home, "train.py").is_file() else module


@dataclass(frozen=True)
class Run:
    """One call of train.py.

    Attributes:
        name: for people.
        folder: its output folder.
        flags: train.py's flags; `options`: the KEY VALUE pairs that follow them.
        needs: the folder of the run whose model it evaluates.
    """

    name: str
    folder: Path
    flags: tuple
    options: tuple
    needs: Path | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        """train.py's command line, with the epoch to load: the last that was saved, unless the best one was."""
        chosen = ()
        if self.needs is not None and not any(self.needs.glob("*/model-best.pth.tar")):
            saved = [path.name.rpartition("-")[2] for path in self.needs.glob("*/model.pth.tar-*")]
            epochs = [int(epoch) for epoch in saved if epoch.isdigit()]
            chosen = ("--load-epoch", str(max(epochs))) if epochs else ()
        return (*self.flags, *chosen, *self.options)

    @property
    def dataset(self) -> str:
        """Its data set's configuration file."""
        return self.flags[self.flags.index("--dataset-config-file") + 1]

    @property
    def complete(self) -> bool:
        log = read_run(self.folder)
        return log is not None and log.complete and (log.evaluates_only or not unsaved(self.folder))

    def contradiction(self) -> str:
        """A line if the run in the folder was not made with these options, else ""."""
        found = read_run(self.folder).settings
        meant = dict(zip(self.options[::2], self.options[1::2], strict=True))  # of equal keys the last
        for key, value in meant.items():
            if key != "TRAIN.CHECKPOINT_FREQ" and not same(value, found.get(key, value)):
                return f"{self.folder} holds a complete run with {key} {found[key]}, not {value}: take another --output"
        return ""


@dataclass(frozen=True)
class Plan:
    """Names a protocol's parameters once; `chains()` lists its runs.

    validation: base2new inside the base classes, on validation scenes, to choose options by (IconScenes alone has it).

    Raises: ValueError with one line for an unknown protocol, host, data set or configuration.
    """

    protocol: str
    hosts: tuple
    datasets: tuple = ()
    seeds: tuple = (1, 2, 3)
    shots: tuple = ()
    source: str = ""
    root: str = "data"
    output: str = "output"
    config: str = "default"
    options: tuple = ()
    home: Path = HERE
    validation: bool = False

    def chains(self) -> list[list[Run]]:
        """A list of lists of `Run`."""
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {self.protocol!r}: take {', '.join(PROTOCOLS)}")
        if len(self.options) % 2:
            raise ValueError(f"options are KEY VALUE pairs, {self.options[-1]!r} stands alone")
        source, targets = SOURCE.get(self.protocol, ("", ELEVEN))
        source = self._datasets([self.source or source])[0] if source else ""
        targets = self._datasets(self.datasets or targets)
        chains = []
        for host in map(self._host, self.hosts):
            for seed in self.seeds:
                if self.protocol == "base2new":
                    chains += [self._base2new(host, dataset, seed) for dataset in targets]
                elif self.protocol == "fewshot":
                    shots = (0,) if host == ZERO_SHOT else self.shots or (1, 2, 4, 8, 16)
                    chains += [[self._few(host, dataset, k, seed)] for dataset in targets for k in shots]
                else:
                    chains += self._cross(host, source, [name for name in targets if name != source], seed)
        return list({chain[0].folder: chain for chain in chains}.values())

    def _host(self, name):
        known = [path.name for path in (self.home / "configs/trainers").glob("*/")]
        served = [*known, *(f"{host}Spotlighter" for host in known)]
        found = next((host for host in served if host.lower() == name.lower()), None)
        if found is None:
            raise ValueError(f"unknown host {name!r}: configs/trainers has {', '.join(sorted(known)) or 'none'}")
        configs = sorted(config_files(self.home, found))
        if self.config not in configs:
            raise ValueError(f"--config {self.config}: {found} has {', '.join(configs) or 'none'}")
        return found

    def _datasets(self, names):
        names = [each for name in names for each in GROUPS.get(name, [name])]
        folder = self.home / "configs/datasets"
        known = sorted(path.stem for path in folder.glob("*.yaml"))
        for name in names:
            if name not in known:
                raise ValueError(f"unknown data set {name!r}: take {', '.join([*GROUPS, *known])}")
        return names

    def _shots(self, host):
        if len(self.shots) > 1:
            raise ValueError(f"{self.protocol} takes one --shots, got {', '.join(map(str, self.shots))}")
        return self.shots[0] if self.shots else 0 if host.startswith("PromptKD") else 16  # PromptKD: every image

    def _run(self, name, host, dataset, seed, folder, *settings, needs=None):
        folder = Path(self.output, folder, f"seed{seed}")
        flags = ["--root", self.root, "--seed", seed, "--trainer", host, "--output-dir", folder]
        flags += ["--dataset-config-file", f"configs/datasets/{dataset}.yaml"]
        flags += ["--config-file", str(config_files(self.home, host)[self.config].relative_to(self.home))]
        if needs is not None or host == ZERO_SHOT:
            flags += ["--eval-only", *(["--model-dir", needs] if needs else [])]
        options = (*settings, *self.options)
        name = f"{host} {dataset} {name} seed {seed}"
        return Run(name, folder, tuple(map(str, flags)), tuple(map(str, options)), needs)

    def _base2new(self, host, dataset, seed):
        shots = self._shots(host)
        halves = ("inner-base", "inner-new") if self.validation else ("base", "new")
        base, new = (
            f"base2new/{part}_{half}/{dataset}/shots_{shots}/{host}/{self.config}"
            for part, half in zip(("train", "test"), halves, strict=True)
        )
        settings = "DATASET.NUM_SHOTS", shots, "DATASET.SUBSAMPLE_CLASSES"
        if host.startswith("PromptKD") and self.validation:
            raise ValueError(f"--validation: {host} trains on all classes' images, so it has no halves of base classes")
        if host.startswith("PromptKD"):  # sees every class's images, without labels, and reports both halves itself
            modal = "TRAINER.MODAL", "base2novel"
            return [self._run("base and new", host, dataset, seed, base, *settings, "all", *modal)]
        train = self._run(halves[0], host, dataset, seed, base, *settings, halves[0])
        test = self._run(halves[1], host, dataset, seed, new, *settings, halves[1], needs=self._model_of(train, host))
        return [train, test]

    def _few(self, host, dataset, shots, seed):
        modal = ("TRAINER.MODAL", "cross") if host.startswith("PromptKD") else ()
        folder = f"{dataset}/{host}/{self.config}_{shots}shots"
        return self._run(f"{shots} shots", host, dataset, seed, folder, "DATASET.NUM_SHOTS", shots, *modal)

    def _cross(self, host, source, targets, seed):
        shots = self._shots(host)
        if host.startswith("PromptKD"):  # distils on the target's own images, without labels
            return [[self._few(host, dataset, shots, seed)] for dataset in targets]
        train = self._few(host, source, shots, seed)
        needs, evaluation = self._model_of(train, host), f"evaluation/{host}/{self.config}_{shots}shots"
        tests = [self._run("test", host, name, seed, f"{evaluation}/{name}", needs=needs) for name in targets]
        return [[train, *tests]]

    @staticmethod
    def _model_of(run, host):
        return None if host == ZERO_SHOT else run.folder
