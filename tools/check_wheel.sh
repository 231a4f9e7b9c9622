#!/usr/bin/env bash
# Builds wheel and sdist, looks for the licence in both, lets twine look at them, installs the wheel in a clean environment with torch alone
# and takes steps there with every optimizer of the registry; then adds [train], and the command trains, writes and resumes.
# Usage: tools/check_wheel.sh [PYTHON with `build` [LOG.md]]     writes sizes and seconds into LOG.md, too
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-python3}")
log=${2:+$(realpath -m "$2")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

begun=$SECONDS
row() { # a row of the log: what was done, what came of it; the seconds since the row before
  printf '| %s | %s | %s |\n' "$1" $((SECONDS - begun)) "$2" >>"$work/log.md"
  begun=$SECONDS
}

"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
wheel=$(echo "$work"/dist/*.whl)
sdist=$(echo "$work"/dist/*.tar.gz)
"$python" -m zipfile --list "$wheel" >"$work/wheel.txt"
tar --list --file "$sdist" >"$work/sdist.txt"
wheel_size="$(($(wc -c <"$wheel") / 1000)) kB, $(($(wc -l <"$work/wheel.txt") - 1)) files" # the list has a heading
sdist_size="$(($(wc -c <"$sdist") / 1000)) kB, $(grep -vc '/$' "$work/sdist.txt") files"
row 'wheel and sdist built' "wheel $wheel_size; sdist $sdist_size"
for name in LICENSE py.typed; do
  grep -q "$name" "$work/wheel.txt" || { echo "error: no $name in the wheel" >&2; exit 1; }
  grep -q "$name" "$work/sdist.txt" || { echo "error: no $name in the sdist" >&2; exit 1; }
done
if grep -q '^benchmarks/' "$work/wheel.txt"; then echo "error: the benchmarks are in the wheel" >&2; exit 1; fi
grep -q '/benchmarks/kit.py$' "$work/sdist.txt" || { echo "error: no benchmarks in the sdist" >&2; exit 1; }

# What a package index would say of both: their metadata, and whether the README is shown.
"$python" -m venv "$work/twine"
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
"$work/twine/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} 'twine>=6'
"$work/twine/bin/twine" check --strict "$wheel" "$sdist"
row 'twine installed, both checked (`--strict`)' 'nothing to say'
printf 'wheel %s; sdist %s\n' "$wheel_size" "$sdist_size"

"$python" -m venv "$work/venv"
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} --constraint constraints.txt "$wheel"
size() { du -sm "$work/venv/lib" | cut -f1; }
alone=$(size)
own=$(du -sk "$work"/venv/lib/python*/site-packages/apollo_optim | cut -f1)
row 'the wheel installed in a new environment' "$own kB of its own, $alone MB with torch (and pip)"
constraints=$PWD/constraints.txt
cd "$work" # so that the checkout is not importable
# -W: torch without numpy warns once; "torch alone" is the point here.
"$work/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata, importlib.util
import torch
import apollo_optim

for name in ("transformers", "datasets", "safetensors", "jsonargparse", "yaml", "rich", "matplotlib"):
    assert importlib.util.find_spec(name) is None, f"{name} is here: this environment is not torch alone"

optimizers = apollo_optim.list_optimizers()
for info in optimizers:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.ReLU(), torch.nn.Linear(96, 8))
    if info.bits:
        apollo_optim.quantize_weights(model, info.bits, targets="*")
    optimizer = apollo_optim.build_optimizer(info.name, model, targets=("all-linear",))
    x, y = torch.randn(64, 48), torch.randint(8, (64,))
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], (info.name, losses)
version = importlib.metadata.version("apollo-optim")
print(f"wheel of apollo-optim {version}: imports and steps with torch {torch.__version__} alone ({', '.join(o.name for o in optimizers)})")
PY
row 'twenty steps with every optimizer, torch alone' 'every loss fell'
# The command without its extras says what to install, in one line.
code=0
message=$(PYTHONWARNINGS=ignore "$work/venv/bin/apollo-optim" pretrain 2>&1) || code=$?
[[ $code == 2 && $message == *"apollo-optim[train]"* ]] || { echo "error: without extras the command said ($code): $message" >&2; exit 1; }
echo "its command, without the extras: $message"
folder=$("$work/venv/bin/apollo-optim" shim)
PYTHONPATH=$folder "$work/venv/bin/python" -W ignore - <<'PY'
import importlib.metadata
import torch
from apollo_torch import APOLLOAdamW

weight = torch.nn.Parameter(torch.ones(8, 6))
optimizer = APOLLOAdamW([{"params": [weight], "rank": 2, "proj": "random", "scale_type": "channel", "scale": 1}], lr=1e-2)
weight.square().sum().backward()
optimizer.step()
assert weight.max() < 1 and optimizer.state[weight]["exp_avg"].shape == (8, 2)
print(f"its apollo_torch {importlib.metadata.version('apollo_torch')} steps, too")
PY
code=0
message=$(PYTHONWARNINGS=ignore "$work/venv/bin/apollo-optim" bench step 2>&1) || code=$?
[[ $code == 2 && $message == *"not installed with the library"* ]] || { echo "error: bench said ($code): $message" >&2; exit 1; }
echo "its benchmarks: $message"

# And with them.
# shellcheck disable=SC2086  # PIP_ARGS is a list of words
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ${PIP_ARGS:-} --constraint "$constraints" "$wheel[train]"
with=$(size)
row 'its extra `[train]` installed, after what the command, the shim and the benchmarks say without it' "$with MB with all it needs"
printf 'installed: %s kB of its own, %s MB with torch (and pip), %s MB with [train]\n' "$own" "$alone" "$with"
words=(--model.name llama-1m --train.batch_size 2 --eval.every null --schedule.kind constant --schedule.warmup 0 --out "$work/run")
"$work/venv/bin/apollo-optim" pretrain "${words[@]}" --train.steps 3 >"$work/run.log" 2>&1 || { cat "$work/run.log" >&2; exit 1; }
"$work/venv/bin/apollo-optim" pretrain --out "$work/run" --resume --train.steps 4 >"$work/run.log" 2>&1 || { cat "$work/run.log" >&2; exit 1; }
"$work/venv/bin/apollo-optim" sample "$work/run" --prompt 'def ' --max-tokens 4 >"$work/sample.txt"
[[ $(<"$work/sample.txt") == *'def '* ]] || { echo "error: sample wrote: $(<"$work/sample.txt")" >&2; exit 1; }
echo "its command, with the extras: trained 3 steps, resumed to 4, and wrote"
row 'three steps of `llama-1m` trained, resumed to a fourth, a sample written' 'done'
if [[ $log ]]; then
  mkdir -p "$(dirname "$log")"
  {
    printf '# The wheel\n\nMade by `make wheel WHEEL_ARGS=%s`: ' "results/welcome/wheel.md"
    "$work/venv/bin/python" -W ignore -c 'import platform, sys, torch; print(platform.system(), platform.machine(), "Python", platform.python_version(), "torch", torch.__version__, end=", ")'
    printf '%s cores with a load of %s in the end; seconds by the clock, downloads included.\n\n' "$(nproc)" "$(cut -d' ' -f1 /proc/loadavg)"
    printf '| what | seconds | what came of it |\n|---|---:|---|\n'
    cat "$work/log.md"
  } >"$log"
fi
