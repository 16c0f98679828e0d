#!/usr/bin/env bash
# Train on all classes of ImageNet (or of SOURCE): xd_train.sh SEED
# With Spotlighter: TRAINER=MaPLeSpotlighter xd_train.sh ...
TRAINER=${TRAINER:-MaPLe}
source "$(dirname "$0")/../common.sh"
usage "SEED" $# 1
SOURCE=${SOURCE:-imagenet}
train "$SOURCE" "$1" "$OUTPUT/$SOURCE/$TRAINER/${CFG}_${SHOTS}shots/seed$1" DATASET.NUM_SHOTS "$SHOTS" "${@:2}"
