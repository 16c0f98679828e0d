#!/usr/bin/env bash
# Distil on every class's images, without labels, and test base and new classes: base2new_train.sh DATASET SEED
# With Spotlighter: TRAINER=PromptKDSpotlighter base2new_train.sh ...
TRAINER=${TRAINER:-PromptKD} SHOTS=${SHOTS:-0}
source "$(dirname "$0")/../common.sh"
usage "DATASET SEED" $# 2
train "$1" "$2" "$OUTPUT/base2new/train_base/$1/shots_$SHOTS/$TRAINER/$CFG/seed$2" \
    DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES all TRAINER.MODAL base2novel "${@:3}"
