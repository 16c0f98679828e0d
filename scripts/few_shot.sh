#!/usr/bin/env bash
# Few-shot learning on all classes, three seeds: few_shot.sh DATASET SHOTS
# Another trainer than CoOp: TRAINER=MaPLeSpotlighter few_shot.sh ...
TRAINER=${TRAINER:-CoOp}
source "$(dirname "$0")/common.sh"
usage "DATASET SHOTS" $# 2
for SEED in ${SEEDS:-1 2 3}; do
    train "$1" "$SEED" "$OUTPUT/$1/$TRAINER/${CFG}_${2}shots/seed$SEED" DATASET.NUM_SHOTS "$2" "${@:3}"
done
