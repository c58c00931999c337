#!/usr/bin/env bash
# Makes a virtual environment and installs this package in it; `make` calls it. Arguments: folder, extras.
# PYTHON: interpreter; TORCH: PyTorch requirement; TORCH_INDEX: package index that PyTorch comes from.
set -euo pipefail
venv=$1 extras=$2
version='import sys; print("%d.%d" % sys.version_info[:2])'
cpu_index=https://download.pytorch.org/whl/cpu

if "$venv/bin/python" -c '' 2>/dev/null; then
  if [ -n "${PYTHON:-}" ] && [ "$("$PYTHON" -c "$version")" != "$("$venv/bin/python" -c "$version")" ]; then
    echo "$venv has Python $("$venv/bin/python" -c "$version"), and PYTHON=$PYTHON is another: run \`make clean\` first." >&2
    exit 1
  fi
else
  python=$(bash "$(dirname "$0")/find_python.sh" "${PYTHON:-}")
  echo "creating $venv with $python"
  "$python" -m venv --clear "$venv"
fi

has_nvidia() {
  command -v nvidia-smi >/dev/null || [ -e /proc/driver/nvidia ] || [ -e /dev/nvidia0 ] || [ -e /etc/nv_tegra_release ]
}
index_is_chosen() {
  [ -n "${TORCH_INDEX:-}${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}" ] ||
    "$venv/bin/python" -m pip config list 2>/dev/null | grep -q 'index-url\|find-links'
}
if [ "$(uname -m)" = x86_64 ] && ! "$venv/bin/python" -c 'import torch' 2>/dev/null && ! index_is_chosen; then
  if has_nvidia; then
    echo "PyTorch comes with CUDA: 5.8 GB, for the NVIDIA GPU of this machine."
  else
    echo "No NVIDIA driver is here, and PyTorch's default build brings 5.8 GB for one. The build for CPUs takes 0.2 GB:"
    echo "  make ${MAKECMDGOALS:-demo} TORCH_INDEX=$cpu_index"
    answer=n
    if [ -t 0 ]; then read -r -p "Take the build for CPUs now? [Y/n] " answer; fi
    if [[ "$answer" != [nN]* ]]; then TORCH_INDEX=$cpu_index; fi
  fi
fi
# torch first: what comes later must not pull in another build of it.
echo "installing $TORCH"
"$venv/bin/python" -m pip install --disable-pip-version-check ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"
echo "installing clustvit_ros with $extras"
"$venv/bin/python" -m pip install --disable-pip-version-check -e ".[$extras]"
echo "$TORCH" > "$venv/.torch"
