#!/usr/bin/env bash
# On the machine with the GPU: deploy/gpu/unpack.sh OUT SITE      unpacks what pack.sh packed
set -euo pipefail
out=${1:?the folder with the pieces} site=${2:?where to install}
mkdir -p "$site/nvidia"
cat "$out"/site.tar.xz.* | xz -dc -T0 | tar x -C "$site"
chmod +x "$site"/torch/bin/* "$site"/triton/backends/nvidia/bin/*
# CUDA's libraries, where torch looks for them: beside itself.
cuda=$(python3 -c 'import importlib.util as u; print(u.find_spec("nvidia").submodule_search_locations[0])')
for package in "$cuda"/*; do [ -e "$site/nvidia/$(basename "$package")" ] || ln -s "$package" "$site/nvidia/"; done
cp -r "$(dirname "$0")/../../vllm_adaskip" "$site/"
mkdir -p "$site/vllm_adaskip-0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm-adaskip\nVersion: 0\n' > "$site/vllm_adaskip-0.dist-info/METADATA"
printf '[vllm.general_plugins]\nadaskip = vllm_adaskip.plugin:register\n' > "$site/vllm_adaskip-0.dist-info/entry_points.txt"
echo "installed into $site: export PYTHONPATH=$site"
