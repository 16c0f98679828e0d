#!/usr/bin/env bash
# Train on the base classes: base2new_train.sh DATASET SEED
# Another trainer than CoOp: TRAINER=MaPLeSpotlighter base2new_train.sh ...
TRAINER=${TRAINER:-CoOp}
source "$(dirname "$0")/common.sh"
usage "DATASET SEED" $# 2
COMMON=$1/shots_$SHOTS/$TRAINER/$CFG/seed$2
train "$1" "$2" "$OUTPUT/base2new/train_base/$COMMON" DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES base "${@:3}"
