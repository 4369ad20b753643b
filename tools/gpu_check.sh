#!/usr/bin/env bash
# The GPU's part of the checks, in under 8 minutes: the tests marked `gpu`, then `dino-sd bench step` for ViT-S/16 and
# ViT-B/16, all in one Markdown file. From the root of a clone or of a copy of its tree, no installation needed:
#
#     tools/gpu_check.sh                 # writes gpu_check.md, or $OUT/gpu_check.md
#
# PYTHON            interpreter with torch (default .venv/bin/python, else python3)
# DINO_SD_WHEELS    folder of wheels, for what a machine without a network lacks (default ./wheels)
# BATCH_S, BATCH_B  images a step of the benches (default by the device's memory: 64 and 32 from 40 GiB on)
# STEPS             steps timed (default 20)
#
# The machine's packages stay as they are: wheels go into a temporary folder for this run, and torch is never one of
# them. matplotlib and wandb are not asked for: nothing here uses them.
# Exit codes: 0 all passed, or no CUDA device; 1 something failed or ran out of time (the file says what); 2 something
# is missing here.
set -euo pipefail
cd "$(dirname "$0")/.."
SECONDS=0 LIMIT=455 # seconds for everything; killing and writing need a few more

PYTHON=${PYTHON:-}
if [ -z "$PYTHON" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
WHEELS=${DINO_SD_WHEELS:-wheels}
REPORT=${OUT:-.}/gpu_check.md
STEPS=${STEPS:-20}

code=0
"$PYTHON" -c '
try:
    import torch
except ImportError:
    raise SystemExit(3)
raise SystemExit(0 if torch.cuda.is_available() else 4)' 2>/dev/null || code=$?
if [ $code -ne 0 ]; then
    if [ $code -ne 4 ] && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
        echo "error: $PYTHON cannot import torch; install the torch of this machine's driver, or set PYTHON" >&2
        exit 2
    fi
    echo "no CUDA device here: nothing to check"
    exit 0
fi

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH="$WORK/site:$WORK:$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# Prints what pip would have to bring, one requirement a line; nothing where all is there.
cat >"$WORK/lacking.py" <<'PY'
import importlib, re, sys
from importlib import metadata, util

minimum = dict(re.findall(r'"([A-Za-z0-9_-]+)>=([0-9.]+)"', open("pyproject.toml").read()))
modules = {
    "torch": "torch", "torchvision": "torchvision", "timm": "timm", "einops": "einops", "numpy": "numpy",
    "PIL": "pillow", "pydantic": "pydantic", "yaml": "PyYAML", "rich": "rich", "typer": "typer",
    "safetensors": "safetensors", "simplejpeg": "simplejpeg", "pytest": "pytest",
}
brings = {  # needed by the module itself; asked for only where the module is missing, and they are too
    "rich": {"markdown_it": "markdown-it-py", "mdurl": "mdurl", "pygments": "Pygments"},
    "typer": {"shellingham": "shellingham", "annotated_doc": "annotated-doc", "click": "click"},
    "pytest": {"iniconfig": "iniconfig", "pluggy": "pluggy", "packaging": "packaging", "pygments": "Pygments"},
}
if sys.version_info < (3, 11):
    brings["pytest"] |= {"exceptiongroup": "exceptiongroup", "tomli": "tomli"}


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version.split("+")[0])[:3]]


def problem(module, name):
    try:
        importlib.import_module(module)
        version = metadata.version(name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if name in minimum and numbers(version) < numbers(minimum[name]):
        return f"{version} is older than {minimum[name]}"
    return None


def requirement(name):
    if name == "torchvision":  # torch 2.11.0 goes with torchvision 0.26.0, 2.14.1 with 0.29.1
        _, minor, patch = numbers(metadata.version("torch"))
        return f"torchvision==0.{minor + 15}.{patch}"
    return f"{name}>={minimum[name]}" if name in minimum else name


wanted = []
for module, name in modules.items():
    found = problem(module, name)
    if found is None:
        continue
    print(f"{name}: {found.splitlines()[0]}", file=sys.stderr)
    if name == "torch":
        sys.exit(3)
    if name == "pydantic":  # each release fits one pydantic-core, and wants what it stands on to be new
        wanted += ["pydantic==2.14.3", "pydantic-core==2.50.4", "annotated-types", "typing-inspection>=0.4.4",
                   "typing-extensions>=4.16"]
    else:
        wanted.append(requirement(name))
    wanted += [other for inner, other in brings.get(module, {}).items() if util.find_spec(inner) is None]
print("\n".join(dict.fromkeys(wanted)))
PY
lacking() { # fills LACKING
    local answer
    answer=$("$PYTHON" "$WORK/lacking.py" 2>"$WORK/why") || {
        echo "error: $(tail -n 1 "$WORK/why")" >&2
        exit 2
    }
    mapfile -t LACKING < <(printf '%s' "$answer")
}
lacking
BROUGHT=${LACKING[*]}
if [ ${#LACKING[@]} -gt 0 ] && [ -d "$WHEELS" ]; then
    timeout 60 "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --find-links "$WHEELS" --target "$WORK/site" "${LACKING[@]}" || echo "pip could not install from $WHEELS" >&2
    lacking
fi
if [ ${#LACKING[@]} -gt 0 ]; then
    version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    arch=$(uname -m) platforms=""
    for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
        platforms+=" --platform ${tag}_$arch"
    done
    {
        echo "error: missing here: ${LACKING[*]}"
        sed 's/^/  /' "$WORK/why"
        echo "bring these wheels in $WHEELS/ (DINO_SD_WHEELS names another folder); where there is a network:"
        echo "  python3 -m pip download -d wheels --no-deps --only-binary=:all: --implementation cp" \
            "--python-version $version$platforms$(printf " '%s'" "${LACKING[@]}")"
    } >&2
    exit 2
fi

mkdir -p "$(dirname "$REPORT")"
"$PYTHON" - "$REPORT" "$BROUGHT" >"$WORK/batches" <<'PY'
import datetime, importlib.util, os, platform, subprocess, sys
import timm, torch, torchvision


def said(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip().splitlines()[0]
    except Exception:
        return "unknown"


triton = "none"
if importlib.util.find_spec("triton"):
    import triton
    triton = triton.__version__
device, count = torch.cuda.get_device_properties(0), torch.cuda.device_count()
gib = device.total_memory / 2**30
rows = {
    "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    "device": f"{count} x {device.name}, {gib:.0f} GiB, compute capability {device.major}.{device.minor}",
    "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, Triton {triton}",
    "others": f"Python {platform.python_version()}, torchvision {torchvision.__version__}, timm {timm.__version__}",
    "brought as wheels": sys.argv[2] or "nothing",
    "host": f"{os.cpu_count()} cores, {platform.platform()}",
    "commit": said("git", "describe", "--always", "--dirty"),
}
with open(sys.argv[1], "w") as file:
    file.write("# GPU check\n\n| | |\n|---|---|\n")
    file.writelines(f"| {name} | {value} |\n" for name, value in rows.items())
# what the published code's float32 step fits into: about 0.5 GB an image for ViT-S, 1 GB for ViT-B
share = 1 if gib >= 38 else 2 if gib >= 20 else 4 if gib >= 10 else 8
print(64 // share, 32 // share)
PY
read -r batch_s batch_b <"$WORK/batches"

# One row a test, written as soon as the test is over: a table of what ran is left also when time runs out.
cat >"$WORK/gpu_rows.py" <<'PY'
import os

seconds, outcomes, notes = {}, {}, {}


def cell(text):
    text = " ".join(str(text).replace("|", "\\|").split())
    return text if len(text) <= 240 else f"{text[:100]} ... {text[-130:]}"


def pytest_runtest_logstart(nodeid, location):
    with open(os.environ["GPU_NOW"], "w") as file:
        file.write(nodeid)


def pytest_runtest_logreport(report):
    name = report.nodeid
    seconds[name] = seconds.get(name, 0) + report.duration
    if report.outcome != "passed":
        outcomes[name] = report.outcome
        crash = getattr(report.longrepr, "reprcrash", None)
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(crash, "message", "")
        notes.setdefault(name, []).append(reason)
    if report.when == "teardown":
        said = [f"{key}: {value}" for key, value in report.user_properties] + notes.get(name, [])
        with open(os.environ["GPU_ROWS"], "a") as file:
            file.write(f"| {cell(name.split('/')[-1])} | {outcomes.get(name, 'passed')} | {seconds[name]:.1f} "
                       f"| {cell('; '.join(said))} |\n")
        os.remove(os.environ["GPU_NOW"])
PY
export GPU_ROWS="$REPORT" GPU_NOW="$WORK/now"
left() { echo $((LIMIT - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
ending() { # what an exit code means, of `timeout` or of what it ran
    case $1 in
    124 | 137) echo "timed out" ;;
    134 | 139) echo "crashed" ;;
    *) echo "exit code $1" ;;
    esac
}

FAILED=()
TESTS=(-m pytest -m gpu -p gpu_rows tests/test_gpu.py tests/test_data_photometry.py)
limit=$(least 200 "$(left)")
printf '\n## Tests\n\n`python %s`, at most %s s\n\n| test | result | seconds | |\n|---|---|---|---|\n' \
    "${TESTS[*]}" "$limit" >>"$REPORT"
echo "tests (at most $limit s) ..."
code=0
CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout -k 5 "$limit" "$PYTHON" "${TESTS[@]}" >"$WORK/log" 2>&1 || code=$?
cat "$WORK/log" && echo
if [ $code -ne 0 ]; then
    FAILED+=("tests ($(ending $code))")
    if [ -s "$GPU_NOW" ]; then
        name=$(basename "$(cat "$GPU_NOW")")
        echo "| $name | $(ending $code) | | |" >>"$REPORT"
    fi
    {
        printf '\nThe tests ended with: %s. The end of what they said:\n\n````\n' "$(ending $code)"
        tail -n 80 "$WORK/log" | cut -c -300
        echo '````'
    } >>"$REPORT"
fi

printf '\n## A training step\n' >>"$REPORT"
bench() { # model, images a step, seconds
    local limit code=0 began=$SECONDS
    local command=(-m dino_sd bench step --steps "$STEPS" --markdown "$REPORT" "model=$1" "batch_size=$2")
    limit=$(least "$3" "$(left)")
    printf '\n`dino-sd bench step --steps %s model=%s batch_size=%s`\n' "$STEPS" "$1" "$2" >>"$REPORT"
    if [ "$limit" -lt 20 ]; then
        printf '\nNot run: no time was left.\n' >>"$REPORT"
        FAILED+=("bench of $1 (no time left)")
        return
    fi
    echo "bench of $1 (at most $limit s) ..."
    timeout -k 5 "$limit" "$PYTHON" "${command[@]}" 2>"$WORK/errors" || code=$?
    cat "$WORK/errors" >&2
    if [ $code -ne 0 ]; then
        FAILED+=("bench of $1 ($(ending $code))")
        printf '\nNo table: %s after %s s. %s\n' "$(ending $code)" $((SECONDS - began)) \
            "$(tail -n 1 "$WORK/errors" | cut -c -300)" >>"$REPORT"
    fi
}
bench vit_small_patch16_224 "${BATCH_S:-$batch_s}" 140
bench vit_base_patch16_224 "${BATCH_B:-$batch_b}" 170

if [ ${#FAILED[@]} -gt 0 ]; then
    result="FAILED:$(printf ' %s;' "${FAILED[@]}")" result=${result%;}
else
    result="all passed"
fi
printf '\n## Result\n\n%s (%s s in all)\n' "$result" "$SECONDS" >>"$REPORT"
echo "$result; written to $REPORT after $SECONDS s"
[ ${#FAILED[@]} -eq 0 ]
