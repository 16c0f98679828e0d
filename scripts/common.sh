# What the scripts share. Sourced with TRAINER set; run from anywhere.
# From the environment: DATA (folder of the data sets), OUTPUT, CFG (a file of configs/trainers/$TRAINER, or of its
# host's), SHOTS, LOADEP (epoch to evaluate; default: the last one saved), PYTHON. Further arguments are KEY VALUE
# options.
set -euo pipefail
DATA=${DATA:-data} OUTPUT=${OUTPUT:-output} CFG=${CFG:-default} SHOTS=${SHOTS:-16} PYTHON=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { # usage WORDS GIVEN NEEDED
    [ "$2" -ge "$3" ] || { echo "usage: [TRAINER=$TRAINER] $0 $1 [KEY VALUE ...]" >&2; exit 2; }
}

is_complete() { # is_complete FOLDER MARK: whether a log in it holds the mark of a finished run
    grep -qs -- "$2" "$1"/log.txt* && echo "complete: $1"
}

last_epoch() { # last_epoch FOLDER: the number of the last checkpoint in it
    local epoch
    epoch=$(ls "$1"/*/model.pth.tar-* 2>/dev/null | sed 's/.*-//' | sort -n | tail -1) || true
    [ -n "$epoch" ] || { echo "error: $1 holds no checkpoint: train first" >&2; exit 1; }
    echo "$epoch"
}

run() { # run DATASET SEED FOLDER OPTION ...: call train.py
    local dataset=$1 seed=$2 folder=$3 config=configs/trainers/$TRAINER/$CFG.yaml
    shift 3
    [ -e "$config" ] || config=configs/trainers/${TRAINER%Spotlighter}/$CFG.yaml
    "$PYTHON" train.py --root "$DATA" --seed "$seed" --trainer "$TRAINER" \
        --dataset-config-file "configs/datasets/$dataset.yaml" --config-file "$config" --output-dir "$folder" "$@"
}

train() { # train DATASET SEED FOLDER KEY VALUE ...
    is_complete "$3" "^Elapsed" || run "$@"
}

evaluate() { # evaluate DATASET SEED FOLDER MODEL_FOLDER KEY VALUE ...
    local dataset=$1 seed=$2 folder=$3 model=$4 epoch
    shift 4
    is_complete "$folder" "^\* accuracy" && return
    epoch=${LOADEP:-$(last_epoch "$model")}
    run "$dataset" "$seed" "$folder" --model-dir "$model" --load-epoch "$epoch" --eval-only "$@"
}
