#!/usr/bin/env bash
# From a model to a tar that may be shipped, or to the reason why not: see usage below.
set -euo pipefail

readonly PROGRAM=${0##*/}

usage() {
    cat <<END
Usage: $PROGRAM [--results FILE] RECIPE MODEL OUT [TARGET]

Compress, verify, build, measure, gate, and pack with checksums:

  RECIPE  a YAML file or the name of a shipped recipe; its 'gates' are the limits
  MODEL   mini-sd2, a diffusers directory, a hub id or a .safetensors file
  OUT     a directory; started again, what is already done there is kept
  TARGET  the device it is for (sdcompress list targets, or a YAML file)

  --results FILE  what a device has measured: the results.json that the script
                  in OUT/run/device.tar writes there

Leaves OUT/release.tar and OUT/release.tar.sha256. Where the engines are for another device, it ends
before the gate with OUT/run/device.tar, and goes on with --results.

Exit codes: 0 packed, 1 it could not be done, 2 usage, 3 a check or a limit was not met (no tar is
left), 4 waiting for the results of a device.
END
}

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

fail() {
    local code=$1
    shift
    say "$*"
    exit "$code"
}

measured=
while (($#)); do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --results)
            (($# > 1)) || fail 2 "--results needs a file; $PROGRAM --help shows how"
            measured=$2
            shift 2
            ;;
        --)
            shift
            break
            ;;
        -*) fail 2 "unknown option $1; $PROGRAM --help lists them" ;;
        *) break ;;
    esac
done
(($# == 3 || $# == 4)) || fail 2 "expected RECIPE MODEL OUT [TARGET], found $# arguments; $PROGRAM --help explains them"
recipe=$1 model=$2 out=$3 target=${4-}
[[ -z $measured || -f $measured ]] || fail 2 "$measured: no such file; bring it from the device"
command -v sdcompress >/dev/null || fail 1 "sdcompress is not on the PATH; activate its environment"

existed=1
[[ -d $out ]] || existed=
mkdir -p "$out"
out=$(cd "$out" && pwd)
readonly run=$out/run tar=$out/release.tar
scratch=$(mktemp -d "$out/.release.XXXXXX")
leave() {
    rm -rf "$scratch"
    # Refused before anything was made: as if it had not been started.
    [[ -n $existed ]] || rmdir --ignore-fail-on-non-empty "$out"
}
trap leave EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
rm -f "$tar" "$tar.sha256" # of an earlier release, which these results may no longer pass

for_target=()
[[ -z $target ]] || for_target=(--target "$target")

say "planning $recipe for $model${target:+ on $target}"
sdcompress plan "$recipe" --model "$model" "${for_target[@]}" --json >"$scratch/plan.json"
if grep -q '^ "gates": null' "$scratch/plan.json"; then
    fail 2 "$recipe: a release needs limits; add 'gates' to the recipe, such as 'gates: {psnr: 20}'"
fi

say "compressing, verifying, building, measuring"
sdcompress run "$recipe" --model "$model" "${for_target[@]}" -o "$run"

# `run` has verified what it made; this time against what lies on the disk now.
say "verifying"
sdcompress verify "$run/onnx/sparse" --against "$run/pruned" --no-parity --json >"$scratch/verify.json"

results=${measured:-$run/results.json}
if [[ -z $measured && -f $run/device.tar ]]; then
    fail 4 "the device has not measured yet: run the script in $run/device.tar there, then start again with --results and the results.json it writes"
fi
[[ -f $results ]] || fail 1 "the engines cannot run on this machine; name the device they are for as TARGET"

limits=(--recipe "$recipe" --run "$run")
# A device makes no pictures; where this machine could, theirs are judged.
[[ -z $measured || ! -f $run/results.json ]] || limits+=(--quality-from "$run/results.json")
say "holding $results against the limits of $recipe"
sdcompress gate "$results" "${limits[@]}" >&2
sdcompress gate "$results" "${limits[@]}" --json >"$scratch/gate.json"

say "packing"
sdcompress report "$run" --results "$results" -o "$scratch/report.html" >/dev/null
cp "$results" "$scratch/results.json"
cp "$run/recipe.yaml" "$scratch"
papers=(gate.json plan.json recipe.yaml report.html results.json verify.json)
parts=()
for part in device.tar engine/sparse; do
    [[ ! -e $run/$part ]] || parts+=("$part")
done
(
    cd "$scratch"
    sha256sum "${papers[@]}"
    cd "$run"
    find "${parts[@]}" -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
) >"$scratch/SHA256SUMS"
# The same files give the same tar: sorted, without dates, owners or links.
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --hard-dereference \
    --transform 's,^,release/,' -cf "$scratch/release.tar" \
    -C "$scratch" SHA256SUMS "${papers[@]}" -C "$run" "${parts[@]}"
(cd "$scratch" && sha256sum release.tar >release.tar.sha256)
mv "$scratch/release.tar.sha256" "$tar.sha256"
mv "$scratch/release.tar" "$tar"
say "done: $tar"
