#!/usr/bin/env bash
# Distil on the target's own images, without labels, and test there: xd_train.sh DATASET SEED
# With Spotlighter: TRAINER=PromptKDSpotlighter xd_train.sh ...
TRAINER=${TRAINER:-PromptKD} SHOTS=${SHOTS:-0}
source "$(dirname "$0")/../common.sh"
usage "DATASET SEED" $# 2
train "$1" "$2" "$OUTPUT/$1/$TRAINER/${CFG}_${SHOTS}shots/seed$2" \
    DATASET.NUM_SHOTS "$SHOTS" TRAINER.MODAL cross "${@:3}"
