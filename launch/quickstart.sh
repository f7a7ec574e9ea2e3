#!/usr/bin/env bash
# Trains configs/video_vae/tiny.yaml on the shipped samples into a new folder and says where the report is.
# Called by `make quickstart`. runs/quickstart points at the newest such run; older ones are kept.
set -euo pipefail
cd "$(dirname "$0")/.."

run_folder=runs/quickstart-$(date +%Y%m%d-%H%M%S)
mkdir -p runs
started=$SECONDS
launch/train_local.sh configs/video_vae/tiny.yaml "$run_folder" "$@"
ln -sfn "$(basename "$run_folder")" runs/quickstart

echo
echo "Done in $((SECONDS - started)) s."
echo "Report:   runs/quickstart/report.html"
echo "Figures:  runs/quickstart/report.json"
echo "Pictures: runs/quickstart/samples/"
