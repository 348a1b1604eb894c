# shellcheck shell=bash
# For the lanes oldest and newest: the versions that are installed, and the tests that versions can break, the quick ones.

# versions PYTHON
versions() {
    "$1" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, requires, version
import re

for name in dict.fromkeys(re.split(r"[^A-Za-z0-9._-]", line)[0] for line in requires("xpuquant") or []):
    try:
        print(f"{name} {version(name)}", end="  ")
    except PackageNotFoundError:
        pass
print()
PYTHON
}

# quick_tests PYTHON [pytest arguments]
quick_tests() {
    local python=$1
    shift
    versions "$python"
    local pytest=(env PYTHONSAFEPATH=1 OMP_NUM_THREADS=1 "$python" -m pytest -q -n 2 -p no:cacheprovider)
    "${pytest[@]}" -m "not slow" tests/formats tests/kernels \
        tests/convert/test_{api,card,checkpoints,doctor,kernel_agreement,report,rounding,same_bytes,verify}.py "$@"
}
