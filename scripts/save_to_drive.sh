#!/usr/bin/env bash
# Pack a checkpoint or a whole run, with its config, into one .tgz in another place.
#
#   bash scripts/save_to_drive.sh runs/v2_output my_checkpoint
#   DEST=gs://bucket/runs bash scripts/save_to_drive.sh runs/v2_output/best_state_dict.pt
#
# DEST is a folder or an fsspec URL; by default it is where Colab mounts a Google Drive, which has to be mounted.
set -euo pipefail
[[ $# -ge 1 && $1 != -* ]] || { echo "usage: bash scripts/save_to_drive.sh CHECKPOINT [NAME]" >&2; exit 2; }
path=${1%/}
name=${2:-$(basename "${path%.pt}")}
DEST=${DEST:-/content/drive/MyDrive/qwen3_runs}
here="$(cd "$(dirname "$0")/.." && pwd)"
PYTHON=$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)

folder=$(dirname "$path")
case $path in
  *.pt) if [ -e "$path" ]; then parts=("$(basename "$path")"); else path=$folder; fi ;;
esac
drive=/content/drive/MyDrive
if [[ $DEST/ == "$drive"/* && ! -d $drive ]]; then
  echo "error: $DEST: no Google Drive is mounted: mount it (from google.colab import drive; drive.mount('/content/drive')), or choose another place with DEST=FOLDER; nothing was written" >&2
  exit 2
fi
[ -e "$path" ] || { echo "error: $path: no such file or folder" >&2; exit 2; }
if [ -d "$path" ]; then
  folder=$(dirname "$path")
  parts=("$(basename "$path")")
else  # a .pt file alone cannot be opened: add its config and tokenizer
  for beside in config.json tokenizer.json tokenizer_config.json chat_template.jinja; do
    if [ -e "$folder/$beside" ]; then parts+=("$beside"); fi
  done
fi

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
tar -czf "$scratch/$name.tgz" -C "$folder" "${parts[@]}"
case $DEST in
  *://*) "$PYTHON" "$here/scripts/_remote.py" push "$scratch/$name.tgz" "$DEST/$name.tgz" ;;
  *) mkdir -p "$DEST" && cp "$scratch/$name.tgz" "$DEST/.$name.tgz.tmp" && mv "$DEST/.$name.tgz.tmp" "$DEST/$name.tgz" ;;
esac
echo "wrote $DEST/$name.tgz ($(du -h "$scratch/$name.tgz" | cut -f1)); unpack it with tar -xzf"
