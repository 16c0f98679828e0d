"""A stand-in for the repository: configuration names and a train.py that only keeps the books of a run.

It prints Dassl's log, saves a checkpoint an epoch and continues from the last one, as the real one does; its accuracies
are a function of trainer, data set, classes, shots, seed and the epochs trained. Its own options: TRAINER.FAIL names a
trainer that fails, TRAINER.SLEEP makes it take time, TRAINER.MEET makes it wait until as many runs have begun.
"""

TRAIN = """
import argparse, os, pathlib, re, sys, time, zlib

if os.environ.get("RANK", "0") != "0":
    sys.exit()
parser = argparse.ArgumentParser()
for flag in "root trainer dataset-config-file config-file output-dir model-dir".split():
    parser.add_argument(f"--{flag}", default="")
parser.add_argument("--seed", type=int)
parser.add_argument("--load-epoch", type=int)
parser.add_argument("--eval-only", action="store_true")
parser.add_argument("opts", nargs=argparse.REMAINDER)
args = parser.parse_args()
opts = dict(zip(args.opts[::2], args.opts[1::2]))
dataset = re.search('NAME: "(.*)"', pathlib.Path(args.dataset_config_file).read_text())[1]
folder = pathlib.Path(args.output_dir)
folder.mkdir(parents=True, exist_ok=True)
path = folder / "log.txt"
log = open(folder / f"log.txt-2026-01-01-00-00-{len(list(folder.glob('log*'))):02d}" if path.exists() else path, "w")

def say(line):
    print(line, file=log, flush=True)

say("***************\\n** Arguments **\\n***************")
for name, value in sorted(vars(args).items()):
    say(f"{name}: {value}")
say("************\\n** Config **\\n************")
say(f"DATASET:\\n  NAME: {dataset}\\n  NUM_SHOTS: {opts.get('DATASET.NUM_SHOTS', -1)}\\n  ROOT: {args.root}")
say(f"  SUBSAMPLE_CLASSES: {opts.get('DATASET.SUBSAMPLE_CLASSES', 'all')}")
say(f"OPTIM:\\n  LR: {opts.get('OPTIM.LR', '0.002')}")
say(f"OUTPUT_DIR: {folder}\\nSEED: {args.seed}\\nTRAINER:\\n  MODAL: {opts.get('TRAINER.MODAL', 'base2novel')}")
say(f"  NAME: {args.trainer}\\nCollecting env info ...")
say(f"{os.environ.get('WORLD_SIZE', 1)} processes, GPUs {os.environ.get('CUDA_VISIBLE_DEVICES', '-')}")
time.sleep(float(opts.get("TRAINER.SLEEP", 0)))
patience = time.monotonic() + 60
while len(list(pathlib.Path("output").rglob("log.txt"))) < int(opts.get("TRAINER.MEET", 0)):
    time.sleep(0.02)
    if time.monotonic() > patience:
        sys.exit("error: nobody came")
if opts.get("TRAINER.FAIL") == args.trainer:
    print("a warning", file=sys.stderr)
    sys.exit("error: no such thing as luck")

def result(kind, epochs):
    words = f"{args.trainer} {dataset} {kind} {opts.get('DATASET.NUM_SHOTS')} {args.seed} {epochs}"
    correct = 500 + zlib.crc32(words.encode()) % 400
    say(f"=> result\\n* total: 1,000\\n* correct: {correct}\\n* accuracy: {correct / 10:.1f}%")
    say("* error: 0.0%\\n* macro_f1: 50.0%")

weights = folder / "prompt_learner"
trained = 0
if args.eval_only:
    if args.model_dir:
        trained = int((pathlib.Path(args.model_dir) / f"prompt_learner/model.pth.tar-{args.load_epoch}").read_text())
else:
    weights.mkdir(exist_ok=True)
    for epoch in range(1, 4):
        file = weights / f"model.pth.tar-{epoch}"
        if file.exists():
            trained = int(file.read_text())
            continue
        time.sleep(float(opts.get("TRAINER.SLEEP", 0)))
        trained += 1
        say(f"epoch [{epoch}/3] batch [1/1] time 0.1 loss 1.0 lr 1.0 eta 0:00:00")
        aside = weights / "aside"
        aside.write_text(str(trained))
        aside.rename(file)
    say("Finish training\\nDeploy the last-epoch model")
say("Evaluate on the *test* set")
result(opts.get("DATASET.SUBSAMPLE_CLASSES", "all"), trained)
if not args.eval_only:
    say("Elapsed: 0:00:01")
"""

DATASETS = {"imagenet": "ImageNet", "caltech101": "Caltech101", "dtd": "DescribableTextures", "imagenet_a": "ImageNetA"}
HOSTS = ("CoOp", "CoOpSpotlighter", "PromptKD", "ZeroshotCLIP")


def make(home):
    """Write the stand-in to a folder and return it."""
    for name, registered in DATASETS.items():
        path = home / f"configs/datasets/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'DATASET:\n  NAME: "{registered}"\n')
    for host in HOSTS:
        path = home / f"configs/trainers/{host}/default.yaml"
        path.parent.mkdir(parents=True)
        path.write_text("")
    (home / "configs/trainers/CoOp/vit_b16.yaml").write_text("")
    (home / "train.py").write_text(TRAIN)
    return home
