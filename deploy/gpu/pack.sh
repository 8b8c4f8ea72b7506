#!/usr/bin/env bash
# Packs vLLM for a machine that has a GPU and Python, but no network: torch, Triton, vLLM and what
# they need, with the device code of other cards zeroed. Run it where pip works.
#   deploy/gpu/pack.sh OUT [CARD] [PYTHON]      CARD 90: H100, H200; PYTHON 3.12: of that machine
# There: deploy/gpu/unpack.sh OUT SITE, then export PYTHONPATH=SITE.
# OUT/site.tar.xz.00, .01, ... are pieces of 48 MiB, for ways that take no more at a time.
# CUDA's own libraries are not packed: they come with the machine's torch, as packages nvidia/*.
set -euo pipefail
out=${1:?where to put the pieces} card=${2:-90} python=${3:-3.12}
here=$(cd "$(dirname "$0")" && pwd) work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
tags=(--python-version "$python" --implementation cp --abi "cp${python/./}" --abi abi3 --abi none --platform any)
for glibc in 1 2010 2014 _2_5 _2_12 _2_17 _2_18 _2_24 _2_26 _2_27 _2_28 _2_31 _2_34 _2_35; do
  tags+=(--platform "manylinux${glibc}_x86_64")
done
pip download -q --no-deps --only-binary=:all: "${tags[@]}" -d "$work/wheels" -r "$here/wheels.txt"
for wheel in "$work"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$work/site"; done
cd "$work/site"
# Kernels of other cards' generations, of a server in another language, of mixtures of experts on
# new cards, tools for profiling, and headers: nothing that serving dense models on CARD loads.
rm -rf torch/include torch/test torch/share/cmake vllm/vllm-rs vllm/third_party/deep_gemm \
  vllm/vllm_flash_attn/_vllm_fa2_C* vllm/_deepselect* vllm/_flashmla* vllm/_flashkda* vllm/_qutlass* \
  triton/backends/amd triton/instrumentation triton/profiler triton/_C/libproton.so \
  triton/backends/nvidia/lib/cupti triton/backends/nvidia/bin/{ptxas-blackwell,nvdisasm}
sed -i '/^amd/d' triton-*.dist-info/entry_points.txt
find . \( -name '*.pyi' -o -name '*.a' \) -delete
find . -name '*.so*' -size +1M -exec python3 "$here/slim.py" "$card" {} +
tar cf - . | xz -T0 --x86 --lzma2=preset=6,dict=32MiB | split -d -b 48M - "$out/site.tar.xz."
du -sh "$out"
