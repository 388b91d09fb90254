#!/usr/bin/env bash
# Makes the environments of bench_peers.py: install_peers.sh FOLDER
# Or those that are named: install_peers.sh FOLDER openvino ctranslate2
# amdsharktank, for peers/export_amdsharktank.py, is made only if it is named. torch is also what
# some of the slow tests take (SF_LOCAL_PEERS=FOLDER).
set -euo pipefail
usual=(llama torch shortfin openvino onnxruntime ctranslate2)
usage() {
  echo "usage: install_peers.sh FOLDER [NAME...]; NAME is one of: ${usual[*]} amdsharktank" >&2
  echo "then: bench_peers.py --peers FOLDER" >&2
  exit 2
}
[[ $# -ge 1 ]] || usage
names=("${@:2}")
[[ ${#names[@]} -gt 0 ]] || names=("${usual[@]}")
for name in "${names[@]}"; do
  [[ " ${usual[*]} amdsharktank " = *" $name "* ]] || usage
done
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=${PYTHON:-python3}

install() { # NAME PIP-ARGUMENTS...
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet --no-cache-dir "${@:2}"
}
install_torch() { # NAME: only the build for CPUs, for PyPI's own brings several GB of CUDA along
  install "$1" --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"
}
llama() { # built for this CPU: 160 MB, about 5 minutes on 2 cores
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
}
torch() { # and transformers: 1,200 MB
  install_torch torch
  install torch "torch==2.13.0" "transformers==5.24.0" "pillow>=11.3"
}
shortfin() { # and what its HTTP server needs, which imports the compiler: 800 MB
  install shortfin "shortfin[apps]==3.9.0" "iree-base-compiler==3.9.0"
}
openvino() { # OpenVINO GenAI, and what converts models for it: 1,600 MB
  install_torch openvino
  install openvino "torch==2.13.0" "openvino-genai==2026.4.1.0" "openvino-tokenizers==2026.4.1.0" \
    "openvino==2026.4.1" "optimum-intel==2.2.0" "nncf==3.4.0"
  # Of another build than torch it fails; models of text do without it
  "$folder/openvino/bin/pip" uninstall --quiet --yes torchvision
}
onnxruntime() { # ONNX Runtime GenAI, and what its builder of models imports: 1,300 MB
  install_torch onnxruntime
  install onnxruntime "torch==2.13.0" "onnxruntime-genai==0.18.0" "onnxruntime==1.31.1" \
    "onnx-ir==1.1.0" "transformers==5.24.0"
}
ctranslate2() { # and what its converter imports: 1,300 MB
  install_torch ctranslate2
  install ctranslate2 "torch==2.13.0" "ctranslate2==4.8.5" "transformers==5.24.0"
}
amdsharktank() { # 1,900 MB, about 2 minutes; it imports wave-lang and does not declare it
  install amdsharktank "amdsharktank==3.9.0" "iree-turbine==3.9.0" "wave-lang==3.9.1" "torch==2.13.0" \
    "iree-base-compiler==3.9.0" "iree-base-runtime==3.9.0"
}

cat <<EOF
This makes Python environments in $folder, 6.5 GB for all and some minutes each: ${names[*]}
It needs Python 3.11, 3.12 or 3.13 (PYTHON=$python), and for llama.cpp a C and C++ compiler.
EOF
for name in "${names[@]}"; do
  echo "+ $name"
  "$name"
done
echo "done; now: python examples/bench_peers.py --bf16 ARTIFACT --peers $folder"
