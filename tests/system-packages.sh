#!/bin/sh
# Install what sandbox hosts and the tests need: as root with apt, else name what is missing and go on.
set -eu
missing=''
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null || missing="$missing $2"
}
need systemd-nspawn systemd-container
need mmdebstrap mmdebstrap
need systemd-analyze systemd
need ssh openssh-client
need mkfs.ext4 e2fsprogs
need shellcheck shellcheck
need tmux tmux
need curl curl
need busybox busybox
python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "missing:$missing" >&2
    echo "hint: sudo apt-get install$missing" >&2
fi
