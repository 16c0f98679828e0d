#!/usr/bin/env bash
# Test the base model on the new classes: base2new_test.sh DATASET SEED
# Another trainer than CoOp: TRAINER=MaPLeSpotlighter base2new_test.sh ...
TRAINER=${TRAINER:-CoOp}
source "$(dirname "$0")/common.sh"
usage "DATASET SEED" $# 2
COMMON=$1/shots_$SHOTS/$TRAINER/$CFG/seed$2
evaluate "$1" "$2" "$OUTPUT/base2new/test_new/$COMMON" "$OUTPUT/base2new/train_base/$COMMON" \
    DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES new "${@:3}"
