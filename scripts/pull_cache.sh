#!/usr/bin/env bash
# Unpack a KD cache into caches/NAME.
#
#   bash scripts/pull_cache.sh alpaca_chat_think_both_L64_K64_R128
#   SOURCE=gs://bucket/caches bash scripts/pull_cache.sh NAME
#
# SOURCE is the folder or fsspec URL with NAME.tgz; by default it is where Colab mounts a Google Drive. To convert a cache
# of .pt files, run `wf cache --import caches/NAME --out caches/NAME-imported -m MODEL`.
set -euo pipefail
[[ $# -eq 1 && $1 != -* && $1 != */* ]] || { echo "usage: bash scripts/pull_cache.sh NAME" >&2; exit 2; }
name=$1
SOURCE=${SOURCE:-/content/drive/MyDrive/qwen3_caches}
here="$(cd "$(dirname "$0")/.." && pwd)"
PYTHON=$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python3)
if [ -e "caches/$name" ]; then
  echo "caches/$name exists already; remove it to unpack it again"
  exit 0
fi
case $SOURCE in
  *://*) archive=$("$PYTHON" "$here/scripts/_remote.py" fetch "$SOURCE/$name.tgz") ;;
  *) archive=$SOURCE/$name.tgz ;;
esac
[ -f "$archive" ] || { echo "error: $archive: no such file; set SOURCE to the folder of $name.tgz" >&2; exit 2; }
aside=caches/.$name.tmp
trap 'rm -rf "$aside"' EXIT
rm -rf "$aside" && mkdir -p "$aside"
tar -xzf "$archive" -C "$aside"
[ -d "$aside/$name" ] || { echo "error: $archive holds no folder $name" >&2; exit 2; }
mv "$aside/$name" "caches/$name"
echo "caches/$name: $(find "caches/$name" -type f | wc -l) files, $(du -sh "caches/$name" | cut -f1)"
