# Packs what `labdeploy render` wrote for a host: prints the name of its content, then its bundle for the host program.
#
#   sh pack.sh rendered/HOST PUSH_ID

set -eu
export LC_ALL=C
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -R "$1/." "$work"
cd "$work"
sums=$(find . -type f | sed 's|^\./||' | sort | xargs sha256sum)
printf '%s\n' "$sums" >SHA256SUMS
printf '{"push_id":"%s","by":"%s","at":"%s"}\n' "$2" "$(id -un)@$(uname -n)" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >manifest.json
hash=$(sha256sum <SHA256SUMS)
printf '%s\n' "${hash%% *}"
tar -czf - . | base64 -w 0
