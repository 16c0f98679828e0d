#!/usr/bin/env bash
# Train on all classes of ImageNet (or of SOURCE): xd_train.sh SEED
# Another trainer than CoOp: TRAINER=MaPLeSpotlighter xd_train.sh ...
TRAINER=${TRAINER:-CoOp}
source "$(dirname "$0")/common.sh"
usage "SEED" $# 1
SOURCE=${SOURCE:-imagenet}
train "$SOURCE" "$1" "$OUTPUT/$SOURCE/$TRAINER/${CFG}_${SHOTS}shots/seed$1" DATASET.NUM_SHOTS "$SHOTS" "${@:2}"
