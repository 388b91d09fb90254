#!/usr/bin/env bash
# Makes the environments of bench_peers.py: install_peers.sh FOLDER
# Or that of peers/export_amdsharktank.py: install_peers.sh FOLDER amdsharktank
# Or torch alone, which some of the slow tests take (SF_LOCAL_PEERS=FOLDER): install_peers.sh FOLDER torch
set -euo pipefail
[[ $# = 1 || ( $# = 2 && ( $2 = amdsharktank || $2 = torch ) ) ]] || {
  echo "usage: install_peers.sh FOLDER [amdsharktank | torch] (then: bench_peers.py --peers FOLDER)" >&2
  exit 2
}
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${PYTHON:-python3}

install() { # NAME PIP-ARGUMENTS...
  echo "+ $1"
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --no-cache-dir "${@:2}"
}
install_torch() { # only the build for CPUs: PyPI's own brings several GB of CUDA along
  install torch --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
  install torch "torch==2.13.0" "transformers==5.24.0" "pillow>=11.3"
}
if [ "${2:-}" = torch ]; then
  echo "This makes a Python environment in $folder: torch for the CPU and transformers, 1,200 MB"
  install_torch
  echo "done; now: SF_LOCAL_PEERS=$folder python -m pytest -m slow"
  exit
fi
if [ "${2:-}" = amdsharktank ]; then # 1,900 MB, about 2 minutes; it imports wave-lang and does not declare it
  install amdsharktank "amdsharktank==3.9.0" "iree-turbine==3.9.0" "wave-lang==3.9.1" "torch==2.13.0" \
    "iree-base-compiler==3.9.0" "iree-base-runtime==3.9.0"
  echo "done; now: $folder/amdsharktank/bin/python examples/peers/export_amdsharktank.py SOURCE FOLDER"
  exit
fi

cat <<EOF
This makes three Python environments in $folder:
  llama     llama-cpp-python, built for this CPU: about 5 minutes on 2 cores, 160 MB
  torch     torch for the CPU and transformers: about 1 minute, 1,200 MB
  shortfin  shortfin and what its HTTP server needs: about 1 minute, 800 MB
It needs Python 3.11, 3.12 or 3.13 (PYTHON=$python), and for llama.cpp a C and C++ compiler.
EOF
for compiler in "${CC:-cc}" "${CXX:-c++}"; do
  command -v "$compiler" >/dev/null || {
    echo "no $compiler here; install a compiler (apt install build-essential) and run this again" >&2
    exit 1
  }
done

# Where llama.cpp's AMX code ends with an illegal instruction (0.3.36 on a virtual Xeon), leave it
# out: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON \
# -DGGML_AVX512_BF16=ON"
CMAKE_ARGS="${CMAKE_ARGS:--DGGML_NATIVE=ON}" install llama --no-binary llama-cpp-python "llama-cpp-python==0.3.36"
install_torch
install shortfin "shortfin[apps]==3.9.0" "iree-base-compiler==3.9.0" # which its server imports
echo "done; now: python examples/bench_peers.py --bf16 ARTIFACT --peers $folder"
