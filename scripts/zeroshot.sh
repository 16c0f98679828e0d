#!/usr/bin/env bash
# Zero-shot CLIP on the base, the new and all classes: zeroshot.sh DATASET
TRAINER=ZeroshotCLIP
source "$(dirname "$0")/common.sh"
usage "DATASET" $# 1
COMMON=$1/shots_$SHOTS/$TRAINER/$CFG/seed1
for half in train_base:base test_new:new; do
    folder=$OUTPUT/base2new/${half%:*}/$COMMON
    is_complete "$folder" "^\* accuracy" ||
        run "$1" 1 "$folder" --eval-only DATASET.NUM_SHOTS "$SHOTS" DATASET.SUBSAMPLE_CLASSES "${half#*:}" "${@:2}"
done
folder=$OUTPUT/$1/$TRAINER/${CFG}_0shots/seed1
is_complete "$folder" "^\* accuracy" || run "$1" 1 "$folder" --eval-only DATASET.NUM_SHOTS 0 "${@:2}"
