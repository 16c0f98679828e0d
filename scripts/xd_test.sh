#!/usr/bin/env bash
# Test the model of xd_train.sh on another data set: xd_test.sh DATASET SEED
# Another trainer than CoOp: TRAINER=MaPLeSpotlighter xd_test.sh ...
TRAINER=${TRAINER:-CoOp}
source "$(dirname "$0")/common.sh"
usage "DATASET SEED" $# 2
SOURCE=${SOURCE:-imagenet} FOLDER=$TRAINER/${CFG}_${SHOTS}shots
evaluate "$1" "$2" "$OUTPUT/evaluation/$FOLDER/$1/seed$2" "$OUTPUT/$SOURCE/$FOLDER/seed$2" "${@:3}"
