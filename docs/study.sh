#!/bin/bash
# All architectures on one data set, under one schedule:
#   bash docs/study.sh shapes|pennfudan|nuclei RATE [OPTIONS]
# Needs DETECTRON2_DATASETS and, except for shapes, WEIGHTS=mobilenetv2_imagenet.pth. If it is
# killed, run it again: it continues where it was.
set -eu
part=$1 rate=$2
shift 2
cd "$(dirname "$0")/.."
case $part in
    shapes) folder=configs/quick suffix=_shapes iterations=2600 ;;
    pennfudan) folder=configs/pennfudan suffix=_mobilenetv2 iterations=240 ;;
    nuclei) folder=configs/nuclei suffix=_mobilenetv2 iterations=400 ;;
esac
overrides=(SOLVER.BASE_LR "$rate")
[ "$part" = shapes ] || overrides+=(MODEL.WEIGHTS "$WEIGHTS")
adaptis=$folder/adaptis$suffix
exec "${PYTHON:-python}" -m solo_d2 compare --train --output "output/study/${part}_$rate" --iterations $iterations \
    "Mask R-CNN=$folder/mask_rcnn$suffix.yaml" \
    "CenterMask=$folder/centermask$suffix.yaml" \
    "YOLACT=$folder/yolact$suffix.yaml" \
    "SOLO=$folder/solo$suffix.yaml" \
    "Decoupled SOLO=$folder/decoupled_solo$suffix.yaml" \
    "SOLOv2=$folder/solov2$suffix.yaml" \
    "AdaptIS=${adaptis}_stage1.yaml+${adaptis}_stage2.yaml" \
    "${overrides[@]}" "$@"
