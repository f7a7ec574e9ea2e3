#!/usr/bin/env bash
# The whole chain on the shipped samples, tiny, on this machine: trains a video VAE and an audio VAE, encodes with both, trains a
# joint diffusion transformer on the latents, exports it and samples short clips with sound. Called by `make chain`.
#
# Environment: as launch/train_local.sh; RUNS (runs) is where everything goes. A finished part is not done again; the video VAE of a
# finished quickstart is taken. Exit code: not 0 if a part fails, or if the loss on held-out clips did not fall at every noise level.
set -euo pipefail
cd "$(dirname "$0")/.."

runs=${RUNS:-runs}
venv=${VENV:-.venv}
latents=$runs/chain_latents
video_vae=$runs/video_vae_tiny
audio_vae=$runs/audio_vae_tiny
started=$SECONDS

part() {
    echo
    echo "== $1"
    shift
    local began=$SECONDS
    "$@"
    echo "== took $((SECONDS - began)) s"
}

if [[ -f $runs/quickstart/export/config.json ]]; then
    video_vae=$runs/quickstart
    echo "== 1/5 video VAE: that of $video_vae"
else
    part "1/5 video VAE" launch/train_local.sh configs/video_vae/tiny.yaml "$video_vae"
fi
part "2/5 audio VAE" launch/train_local.sh configs/audio_vae/tiny.yaml "$audio_vae"
for table in train validation; do
    part "3/5 encoding $table" launch/encode_local.sh configs/encode/tiny.yaml \
        --set "video.model.pretrained=$video_vae/export" --set "audio.model.pretrained=$audio_vae/export" \
        --set "data.media=samples/$table.csv" --output-dir "$latents/$table"
done
part "4/5 diffusion transformer" launch/train_local.sh configs/diffusion/tiny.yaml "$runs/diffusion_tiny" \
    --set "vae.pretrained=$video_vae/export" --set "audio_vae.pretrained=$audio_vae/export" \
    --set "data.train=$latents/train" --set "data.validation=$latents/validation"
part "5/5 sampling" "$venv/bin/aiprod-ds" sample configs/sample/tiny.yaml --output-dir "$runs/samples_tiny" \
    --set "model.pretrained=$runs/diffusion_tiny/export" --set "vae.pretrained=$video_vae/export" \
    --set "audio_vae.pretrained=$audio_vae/export"

echo
echo "Done in $((SECONDS - started)) s."
echo "Reports: $video_vae/report.html, $audio_vae/report.html, $runs/diffusion_tiny/report.html"
echo "Clips:   $runs/samples_tiny/"
"$venv/bin/python" - "$runs/diffusion_tiny/report.json" <<'PYTHON'
import json, pathlib, sys

metrics = json.loads(pathlib.Path(sys.argv[1]).read_text())["metrics"]
names = [name.removesuffix("_before") for name in metrics if "_loss_at_" in name and name.endswith("_before")]
risen = [name for name in names if not metrics[f"{name}_after"] < metrics[f"{name}_before"]]
print("Loss on held-out clips by noise level:")
for name in names:
    print(f"  {name:24} {metrics[f'{name}_before']:.3f} -> {metrics[f'{name}_after']:.3f}")
if risen or not names:
    sys.exit(f"launch/chain.sh: the loss must fall at every noise level, got a rise of {', '.join(risen) or 'nothing measured'}.")
PYTHON
