#!/usr/bin/env bash
# The GPU's part of the checks, in under 8 minutes: tests marked `gpu`, then `dino-sd bench step` for ViT-S/16 and
# ViT-B/16, all into one Markdown file. Run it from the root of a clone:
#
#     tools/gpu_check.sh                 # writes gpu_check.md, or $OUT/gpu_check.md
#
# PYTHON: interpreter (default .venv/bin/python, else python3). DINO_SD_WHEELS: folder of wheels for machines without a
# network (default ./wheels). BATCH_S, BATCH_B: images a step. torch and torchvision are taken as they are, never
# replaced.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
WHEELS=${DINO_SD_WHEELS:-wheels}
REPORT=${OUT:-.}/gpu_check.md

if ! "$PYTHON" -c 'import torch' 2>/dev/null; then
    if ! nvidia-smi -L >/dev/null 2>&1; then
        echo "no CUDA device here: nothing to check"
        exit 0
    fi
    echo "error: $PYTHON has no torch; install it for this machine's driver first" >&2
    exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device here: nothing to check"
    exit 0
fi

# What is missing, as the names that pip knows. Torchvision has to fit torch, so it is asked for with torch's own pair.
missing() {
    "$PYTHON" - <<'PY'
import importlib.util
names = {"torchvision": "torchvision", "timm": "timm", "einops": "einops", "pydantic": "pydantic", "yaml": "PyYAML",
         "typer": "typer", "rich": "rich", "safetensors": "safetensors", "PIL": "pillow", "numpy": "numpy",
         "matplotlib": "matplotlib", "wandb": "wandb", "pytest": "pytest"}
print(" ".join(wheel for module, wheel in names.items() if importlib.util.find_spec(module) is None))
PY
}
MISSING=$(missing)
if [ -n "$MISSING" ] && [ -d "$WHEELS" ]; then
    KEEP=$(mktemp)
    "$PYTHON" -c 'import torch; print("torch==" + torch.__version__)' >"$KEEP"
    # shellcheck disable=SC2086 (a list of names)
    "$PYTHON" -m pip install --quiet --no-index --find-links "$WHEELS" --constraint "$KEEP" $MISSING
    MISSING=$(missing)
fi
if [ -n "$MISSING" ]; then
    echo "error: missing here: $MISSING" >&2
    echo "bring their wheels in $WHEELS/; where there is a network, collect them with (torchvision: the one of this torch)" >&2
    echo "  pip download --dest wheels --only-binary :all: --python-version $("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') $MISSING" >&2
    exit 2
fi

mkdir -p "$(dirname "$REPORT")"
{
    echo "# GPU check"
    echo
    "$PYTHON" - <<'PY'
import datetime, timm, torch, torchvision
device = torch.cuda.get_device_properties(0)
print(f"{datetime.date.today()}, {device.name} ({device.total_memory / 2**30:.0f} GiB), torch {torch.__version__}, "
      f"CUDA {torch.version.cuda}, torchvision {torchvision.__version__}, timm {timm.__version__}")
PY
    echo
    echo "## Tests"
    echo
    echo "\`python -m pytest -m gpu tests/test_gpu.py\`"
    echo
    echo '```'
} >"$REPORT"
timeout 200 "$PYTHON" -m pytest -m gpu -v --durations=0 tests/test_gpu.py 2>&1 | tee -a "$REPORT"
TESTS=${PIPESTATUS[0]}
{ [ "$TESTS" -eq 124 ] && echo "timed out"; echo '```'; echo; echo "## A training step"; } >>"$REPORT"

FAILED=$TESTS
bench() { # model, images a step
    echo -e "\n\`dino-sd bench step --steps 20 model=$1 batch_size=$2\`" >>"$REPORT"
    timeout 125 "$PYTHON" -m dino_sd bench step --steps 20 --markdown "$REPORT" "model=$1" "batch_size=$2"
    local code=$?
    if [ $code -ne 0 ]; then
        echo -e "\nfailed ($([ $code -eq 124 ] && echo timed out || echo "exit code $code"))" >>"$REPORT"
        FAILED=$code
    fi
}
bench vit_small_patch16_224 "${BATCH_S:-64}"
bench vit_base_patch16_224 "${BATCH_B:-64}"
echo "written to $REPORT"
exit "$FAILED"
