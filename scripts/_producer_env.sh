# shellcheck shell=bash
# Sourced by make-smollm2, make-fixtures and make-oracles: one virtual environment per producer,
# because their pins on torch and transformers contradict each other.
#
#   producer_python NAME    makes .venv-NAME if it is not whole, prints the path of its python
#
# NAME: see _requirements. XPUQUANT_VENVS=DIR keeps them elsewhere than in the
# repository's root; PYTHON names the Python (3.11 or newer) they are made from.

_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
XPUQUANT_VENVS=${XPUQUANT_VENVS:-$_root}

# What each environment installs. After `--`, without dependencies: old releases whose pin on torch is
# older than they need.
_requirements() {
    case $1 in
        gguf)           echo "torch==2.13.0 transformers==4.57.6 accelerate gguf sentencepiece protobuf" ;;
        gptqmodel)      echo "torch==2.14.1 torchvision gptqmodel==7.7.0" ;;
        autoround)      echo "torch==2.13.0 auto-round==0.16.1" ;;
        autoround-0.15) echo "torch==2.13.0 auto-round==0.15.0" ;;
        llmc)           echo "torch==2.13.0 llmcompressor==0.14.0.1" ;;
        llmc-0.12)      echo "torch==2.13.0 transformers==5.9.0 $_llmc -- llmcompressor==0.12.0.2 compressed-tensors==0.17.1" ;;
        llmc-0.9)       echo "torch==2.13.0 transformers==4.57.3 $_llmc -- llmcompressor==0.9.0.5 compressed-tensors==0.13.0" ;;
        *)              echo "no producer environment is called $1" >&2; return 1 ;;
    esac
}
_llmc="accelerate datasets loguru nvidia-ml-py pillow pydantic requests"

producer_python() {
    local wanted env
    wanted=$(_requirements "$1") || return 1
    env=$XPUQUANT_VENVS/.venv-$1
    # The mark is written last, so that an interrupted installation is done again; it holds the
    # requirements, so that a changed pin is installed.
    if [ "$(cat "$env/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "making $env: $wanted" >&2
        "${PYTHON:-python3.11}" -m venv "$env"
        # torch first: what comes after must accept it, not replace it.
        "$env/bin/pip" install -qq --disable-pip-version-check setuptools wheel "${wanted%% *}" >&2 || return 1
        # shellcheck disable=SC2086
        "$env/bin/pip" install -qq --disable-pip-version-check ${wanted%% -- *} >&2 || return 1
        if [[ $wanted == *" -- "* ]]; then
            # shellcheck disable=SC2086
            "$env/bin/pip" install -qq --disable-pip-version-check --no-deps ${wanted##* -- } >&2 || return 1
        fi
        echo "$wanted" > "$env/.installed"
    fi
    echo "$env/bin/python"
}
